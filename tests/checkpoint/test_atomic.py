"""Output that appears whole or not at all: full disks, two writers, killed runs."""

import errno
import multiprocessing
import os
import resource
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qalora_plugin.errors import OutputError
from qalora_plugin.files import atomic
from qalora_plugin.files.atomic import (
    AtomicDirectory,
    ScratchDirectory,
    atomic_file,
    check_space,
    check_target,
    hold,
    saved_by_others,
)
from qalora_plugin.files.writer import write_weights
from qalora_plugin.formats.export import export_model

FORK = multiprocessing.get_context("fork")  # no imports: at once
KINDS = {"directory": AtomicDirectory, "scratch": ScratchDirectory, "file": atomic_file}


def write_for_ever(kind, target, ready):
    """Begin to write, say so, and never end."""
    if kind == "hold":
        hold(target)
        ready.set()
        time.sleep(600)
    with KINDS[kind](target) as partial:
        (partial if kind == "file" else partial / "x").write_text("theirs")
        ready.set()
        time.sleep(600)


def write_once(target, start, codes):
    """Write 200 files as soon as all are there."""
    start.wait()
    try:
        with AtomicDirectory(target) as partial:
            for number in range(200):
                (partial / str(number)).write_text("x")
        codes.put("written")
    except OutputError as error:
        codes.put("another process" if "another process" in str(error) else "not empty")


@pytest.fixture
def other_process():
    """`other_process(kind, target)`: a process that is writing there; killed at the end."""
    started = []

    def start(kind, target):
        ready = FORK.Event()
        process = FORK.Process(target=write_for_ever, args=(kind, target, ready), daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(60)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


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
    process.kill()
    process.join()
    assert hidden(tmp_path) and not target.exists()
    if kind == "file":
        with atomic_file(target) as partial:
            partial.write_text("ours")
    else:
        with AtomicDirectory(target) as partial:
            (partial / "x").write_text("ours")
    assert not hidden(tmp_path) and target.exists()


def test_many_writers_at_once_one_wins_and_the_others_say_so(tmp_path):
    start, codes = FORK.Barrier(6), FORK.Queue()
    arguments = (tmp_path / "out", start, codes)
    started = [FORK.Process(target=write_once, args=arguments) for _ in range(6)]
    for process in started:
        process.start()
    found = [codes.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert found.count("written") == 1, found
    files = {path.name for path in (tmp_path / "out").iterdir()} - {"qalora_manifest.json"}
    assert len(files) == 200 and not hidden(tmp_path)


def test_a_second_training_into_one_directory_is_refused(other_process, tmp_path):
    process = other_process("hold", tmp_path / "run")
    with pytest.raises(OutputError, match="another process is training into it"):
        hold(tmp_path / "run")
    process.kill()
    process.join()
    hold(tmp_path / "run")
    hold(tmp_path / "run")  # the same process may train there again


def test_a_link_to_itself_is_no_place_to_write_to(tmp_path):
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OutputError, match="out: is a file"):
        AtomicDirectory(tmp_path / "out")
    with pytest.raises(OutputError, match="out: exists"):
        check_target(tmp_path / "out")


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


@pytest.fixture
def limited():
    """No file may grow beyond 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVED = {
    "numpy": lambda path: np.save(path, np.zeros(1000)),
    "safetensors": lambda path: save_file({"a": torch.zeros(1000)}, path),
    "tokenizers": lambda path: tokenizer().save(str(path)),
}


def tokenizer():
    return Tokenizer(WordLevel({f"word{number}": number for number in range(1000)}, "word0"))


@pytest.mark.parametrize("library", SAVED)
def test_a_full_disk_is_our_error_where_a_library_writes(library, tmp_path, limited):
    with (
        pytest.raises(OutputError, match=r"\d+ bytes are free"),
        saved_by_others(tmp_path),
    ):
        SAVED[library](tmp_path / "file")


def test_other_errors_of_a_library_stay_what_they_are(tmp_path):
    with pytest.raises(ValueError, match="os error 2"), saved_by_others(tmp_path):
        raise ValueError("No such file or directory (os error 2)")


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


def test_a_place_that_takes_no_files_is_not_taken_for_another_writer():
    with pytest.raises(OutputError, match=r"cannot be (made|written)"), AtomicDirectory("/proc/x"):
        pass
