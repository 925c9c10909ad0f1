"""Fixtures that export, and run exports, in the environment that has every format's library."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora_plugin.checkpoint.format import format_named

RunExport = Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def qalora(command_line):
    """`qalora("export", ...)` -> stdout of this project's command line in that environment."""
    return command_line("export")


@pytest.fixture
def run_export(programs, tmp_path):
    """`run_export(format, exported, ids, *more)` -> what the format's program printed and saved."""

    def run(format, exported, ids, *more, environment="export"):
        given, out = tmp_path / "input.safetensors", tmp_path / "output.safetensors"
        save_file({"input_ids": ids}, given)
        arguments = [format_named(format).script, exported, given, out, *more]
        printed = programs(environment)(*arguments).strip().splitlines()
        found = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
        return found, load_file(out)

    return run
