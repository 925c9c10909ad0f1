"""A base, an adapter and a merged model; actions on them in forked processes that may be killed."""

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.random_adapter import random_adapter

from qalora_plugin import merge_adapter, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import QALoRAError
from qalora_plugin.formats.export import export_model
from qalora_plugin.quickstart.embedded import base_model_path

TIMES = int(os.environ.get("QALORA_FAULTS", "6"))  # of each fault; `make faults` sets 200
FORK = multiprocessing.get_context("fork")  # at once: nothing is imported again
EXPORTS = ("torchao", "mlx", "gguf", "lora")


class Models(NamedTuple):
    """Directories of a 16-bit model, its quantized base, an adapter for it, and both merged."""

    dense: Path
    base: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Small models on disk."""
    torch.set_num_threads(1)  # forked processes have no other threads
    folder = tmp_path_factory.mktemp("models")
    found = Models(base_model_path(), *(folder / name for name in ("base", "adapter", "merged")))
    quantize_model(found.dense, found.base, method="rtn", progress=False)
    random_adapter(open_quantized(found.base), found.adapter)
    merge_adapter(found.adapter, found.merged, found.base)
    return found


def actions(models, out):
    """What writes something, by name: (function, target)."""
    found = {
        "quantize": (
            lambda: quantize_model(models.dense, out / "q", method="rtn", progress=False),
            out / "q",
        ),
        "merge": (lambda: merge_adapter(models.adapter, out / "m", models.base), out / "m"),
    }
    for name in EXPORTS:
        source = models.adapter if name == "lora" else models.merged
        target = out / ("x.gguf" if name == "gguf" else f"x-{name}")
        options = {"base": models.base} if name == "lora" else {}
        found[name] = (
            lambda source=source, target=target, name=name, options=options: export_model(
                source, target, name, **options
            ),
            target,
        )
    return found


def content(path):
    """The bytes of a file, or of all files of a directory, by name."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def remove(path):
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _child(act, prepare, results):
    prepare()
    try:
        act()
        results.put("done")
    except QALoRAError as error:
        results.put(f"{type(error).__name__}: {error}")
    except BaseException as error:  # what a user would see as a traceback
        results.put(f"RAW {type(error).__name__}: {error}")


def in_child(act, prepare=lambda: None):
    """Run an action in a process of its own; return "done", our error, or "RAW ..."."""
    results = FORK.Queue()
    process = FORK.Process(target=_child, args=(act, prepare, results), daemon=True)
    process.start()
    found = results.get(timeout=120)
    process.join()
    return found


def killed_after(act, seconds):
    """Run an action in a process of its own, and kill it; say whether it had ended by then."""
    process = FORK.Process(target=act, daemon=True)
    process.start()
    time.sleep(seconds)
    ended = process.exitcode is not None
    process.kill()
    process.join()
    return ended


@pytest.fixture
def draw():
    """A random generator whose draws are the same in every run."""
    return random.Random(0)
