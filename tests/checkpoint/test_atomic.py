"""Output that appears whole or not at all: full disks, two writers, killed runs."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from qalora_plugin.errors import OutputError
from qalora_plugin.files import atomic
from qalora_plugin.files.atomic import (
    AtomicDirectory,
    ScratchDirectory,
    atomic_file,
    check_space,
    hold,
)
from qalora_plugin.files.writer import write_weights
from qalora_plugin.formats.export import export_model

WRITER = """
import sys, time
from pathlib import Path
from qalora_plugin.files.atomic import AtomicDirectory, ScratchDirectory, atomic_file, hold
kind, target = sys.argv[1:]
if kind == "hold":
    hold(target)
    print("ready", flush=True)
    time.sleep(60)
with {"directory": AtomicDirectory, "scratch": ScratchDirectory, "file": atomic_file}[kind](
    Path(target)
) as partial:
    (partial.with_name(partial.name) if kind == "file" else partial / "x").write_text("theirs")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process():
    """`other_process(kind, target)`: a process that is writing there; killed at the end."""
    started = []

    def start(kind, target):
        command = [sys.executable, "-c", WRITER, kind, str(target)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def hidden(directory):
    """Names of what lies hidden in a directory."""
    return [path.name for path in directory.glob(".*")]


def test_a_second_writer_to_one_directory_is_refused(other_process, tmp_path):
    other_process("directory", tmp_path / "out")
    before = hidden(tmp_path)
    with pytest.raises(OutputError, match="another process is writing there"):
        AtomicDirectory(tmp_path / "out").__enter__()
    assert hidden(tmp_path) == before  # theirs is untouched, ours is gone


def test_a_second_writer_to_one_file_is_refused(other_process, tmp_path):
    other_process("file", tmp_path / "m.gguf")
    with pytest.raises(OutputError, match="another process"), atomic_file(tmp_path / "m.gguf"):
        pass
    assert len(hidden(tmp_path)) == 2  # theirs, and their lock


def test_scratch_of_another_process_is_no_obstacle_and_stays(other_process, tmp_path):
    other_process("scratch", tmp_path / "out")
    (theirs,) = tmp_path.glob(".out.partial-scratch-*")
    with AtomicDirectory(tmp_path / "out") as partial:
        (partial / "x").write_text("ours")
    assert (theirs / "x").read_text() == "theirs" and (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize("kind", ["directory", "file", "scratch"])
def test_what_a_killed_process_left_is_removed_by_the_next(kind, other_process, tmp_path):
    target = tmp_path / ("m.gguf" if kind == "file" else "out")
    process = other_process(kind, target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert hidden(tmp_path) and not target.exists()
    if kind == "file":
        with atomic_file(target) as partial:
            partial.write_text("ours")
    else:
        with AtomicDirectory(target) as partial:
            (partial / "x").write_text("ours")
    assert not hidden(tmp_path) and target.exists()


def test_many_writers_at_once_one_wins_and_the_others_say_so(tmp_path):
    code = (
        "import sys; from qalora_plugin.files.atomic import AtomicDirectory as D\n"
        "from qalora_plugin.errors import OutputError\n"
        "try:\n"
        "    with D(sys.argv[1]) as p:\n"
        "        [(p / str(i)).write_text('x') for i in range(200)]\n"
        "except OutputError: sys.exit(3)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    errors = [process.communicate()[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 3, 3, 3], errors
    assert len(list((tmp_path / "out").iterdir())) == 200 and not hidden(tmp_path)


def test_a_second_training_into_one_directory_is_refused(other_process, tmp_path):
    process = other_process("hold", tmp_path / "run")
    with pytest.raises(OutputError, match="another process is training into it"):
        hold(tmp_path / "run")
    process.kill()
    process.wait()
    hold(tmp_path / "run")
    hold(tmp_path / "run")  # the same process may train there again


def test_too_little_space_is_known_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 60, 40))
    check_space(tmp_path, 40)
    plan = {"a": (torch.float32, (11,))}
    with pytest.raises(OutputError, match="needs 44 bytes, and 40 bytes are free"):
        write_weights(tmp_path, plan, {}, lambda name: {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", [AtomicDirectory, ScratchDirectory, atomic_file])
def test_a_disk_that_fills_up_is_one_error_that_names_bytes(kind, code, tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError, match=r"\d+ bytes are free"), kind(target):
        raise OSError(code, os.strerror(code))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_failures_at_the_end_are_ours_too(call, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic.os, call, fail)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        AtomicDirectory(tmp_path / "out") as partial,
    ):
        (partial / "x").write_text("x")
    assert not any(tmp_path.iterdir())


def test_the_record_of_an_export_appears_with_it(base_dir, tmp_path, monkeypatch):
    seen = []
    original = os.rename

    def rename(source, target):
        if Path(target) == tmp_path / "out":
            seen.extend(path.name for path in Path(source).iterdir())
        original(source, target)

    monkeypatch.setattr(atomic.os, "rename", rename)
    result = export_model(base_dir, tmp_path / "out", "torchao")
    assert result.out == tmp_path / "out" and "qalora_export.json" in seen
    assert not hidden(tmp_path) and not hidden(tmp_path / "out")


def test_locks_end_with_the_work(tmp_path):
    for _ in range(3):
        with AtomicDirectory(tmp_path / "out") as partial:
            (partial / "x").write_text("x")
        shutil.rmtree(tmp_path / "out")
    start = time.monotonic()
    with ScratchDirectory(tmp_path / "out"), AtomicDirectory(tmp_path / "out"):
        pass
    assert time.monotonic() - start < 5
