"""Fixtures that export, and run exports, in the environment that has every format's library."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora_plugin.checkpoint.format import format_named

RunExport = Callable[..., tuple[dict[str, Any], dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def qalora(env_python, project_path):
    """`qalora("export", ...)` -> stdout of this project's command line in that environment."""
    program = Path(__file__).parent / "commands.py"
    environment = os.environ | {"PYTHONPATH": str(project_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [env_python("export"), "-P", program],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def run(*arguments):
        print(json.dumps([str(argument) for argument in arguments]), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"qalora {arguments}: its process ended; what it said is above"
        found = json.loads(answer)
        if found["status"]:
            pytest.fail(f"qalora {arguments}: {found['status']}\n{found['stderr'][-4000:]}")
        return found["stdout"]

    with process:
        yield run


@pytest.fixture
def run_export(env_python, run_python, tmp_path):
    """`run_export(format, exported, ids, *more)` -> what the format's program printed and saved."""

    def run(format, exported, ids, *more, environment="export"):
        given, out = tmp_path / "input.safetensors", tmp_path / "output.safetensors"
        save_file({"input_ids": ids}, given)
        arguments = [format_named(format).script, exported, given, out, *more]
        printed = run_python(env_python(environment), *arguments).strip().splitlines()
        found = json.loads(printed[-1]) if printed and printed[-1].startswith("{") else {}
        return found, load_file(out)

    return run
