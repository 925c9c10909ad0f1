"""Faults while something is written: kills, full disks, two writers; and what is opened meanwhile.

Six faults of each kind by default; `make faults` makes 200. Each test prints what it counted.
"""

import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import QALoRAError
from qalora_plugin.formats.export import export_model

from .conftest import EXPORTS, FORK, TIMES, actions, content, in_child, killed_after, remove

NAMES = ("quantize", "merge", *EXPORTS)


@pytest.fixture(params=NAMES)
def action(request, models, tmp_path):
    """(name, function, target, what it writes, seconds that it takes)."""
    act, target = actions(models, tmp_path)[request.param]
    start = time.monotonic()
    assert in_child(act) == "done"
    seconds, expected = time.monotonic() - start, content(target)
    remove(target)
    assert not any(tmp_path.iterdir())
    return request.param, act, target, expected, seconds


def test_kills(action, draw, tmp_path):
    """After SIGKILL at any time the target is absent or whole; the next run ends, and is alone."""
    name, act, target, expected, seconds = action
    counts = Counter()
    for _ in range(TIMES):
        counts["ended"] += killed_after(act, draw.uniform(0, seconds))
        if target.exists():
            counts["whole"] += 1
            assert content(target).keys() == expected.keys(), "a torn target"
            remove(target)
        else:
            counts["absent"] += 1
        counts["left for the next run"] += bool(list(tmp_path.iterdir()))
        assert in_child(act) == "done"
        assert content(target).keys() == expected.keys()
        remove(target)
        assert not list(tmp_path.iterdir()), "something is left behind"
    print(f"\n{name}: {TIMES} kills: {dict(counts)}")


def test_full_disks(action, draw, tmp_path):
    """No file may grow beyond a limit: one error of ours that names bytes, and nothing is left."""
    name, act, target, expected, _ = action
    largest, counts = max(map(len, expected.values())), Counter()
    for _ in range(TIMES):
        limit = draw.randrange(1, largest)
        found = in_child(
            act, lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        )
        assert found.startswith("OutputError") and "bytes are free" in found, found
        assert not target.exists()
        counts["refused"] += 1
        for path in tmp_path.iterdir():  # quantizing goes on where it stopped
            assert name == "quantize" and "resume" in path.name
            remove(path)
    print(f"\n{name}: {TIMES} limits: {dict(counts)}")


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(bytes)`: a file system of this size; skips where none may be mounted."""
    mounted = []

    def mount(size):
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("name", NAMES)
def test_small_disks(name, share, models, small_disk, tmp_path):
    """A file system that is too small for all, or for the last files only."""
    act, target = actions(models, tmp_path)[name]
    assert in_child(act) == "done"
    disk = small_disk(int(share * sum(map(len, content(target).values()))))
    act, target = actions(models, disk)[name]
    found = in_child(act)
    assert found.startswith("OutputError") and "bytes" in found and "free" in found, found
    assert not target.exists()
    print(f"\n{name} on {share:.0%} of its space: {found[-90:]}")


@pytest.mark.parametrize("name", NAMES)
def test_two_writers(name, models, tmp_path):
    """Of several at once to one target one writes, and the others say so."""
    counts, rounds = Counter(), max(1, TIMES // 6)
    for number in range(rounds):
        out = tmp_path / str(number)
        out.mkdir()
        act, target = actions(models, out)[name]
        results = FORK.Queue()
        started = [FORK.Process(target=_report, args=(act, results)) for _ in range(3)]
        for process in started:
            process.start()
        found = [results.get(timeout=240) for _ in started]
        for process in started:
            process.join()
        counts.update(found)
        assert found.count("done") == 1 and not [text for text in found if "RAW" in text], found
        assert list(out.iterdir()) == [target]
    print(f"\n{name}: {rounds} rounds of three: {dict(counts)}")


def _report(act, results):
    try:
        act()
        results.put("done")
    except QALoRAError as error:
        results.put(type(error).__name__)
    except BaseException as error:
        results.put(f"RAW {error!r}")


def test_nothing_else_is_opened(models, tmp_path):
    """Only what was named, the interpreter and its packages, and temporary files are opened."""
    inside = [models.base, models.adapter, models.merged, models.dense, tmp_path]
    system = [sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr", "/tmp/torch"]
    project = Path(__file__).resolve().parents[2]
    roots = tuple(str(Path(root).resolve()) for root in (*inside, *system, project))
    outside, count = [], Counter()

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            count["opened"] += 1
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(roots):
                outside.append(path)

    def act():
        sys.addaudithook(watch)
        for function, _ in actions(models, tmp_path).values():
            function()
        describe(models.merged)
        assert not outside, outside[:5]
        print(f"\n{count['opened']} files opened, 0 outside of what was given")

    assert in_child(act) == "done"


@pytest.mark.parametrize("which", ["base", "merged"])
def test_flipped_bits(which, models, draw, tmp_path):
    """One flipped bit in any file is found by whoever reads the directory."""
    from shutil import copytree

    directory = copytree(getattr(models, which), tmp_path / "copy")
    doors = {
        "base": lambda: merge_adapter(models.adapter, tmp_path / "out", directory),
        "merged": lambda: export_model(directory, tmp_path / "out", "torchao"),
    }
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    counts = Counter()
    for number in range(max(TIMES, len(files))):
        path = files[number % len(files)]
        before = path.read_bytes()
        if not before:
            continue
        after = bytearray(before)
        after[draw.randrange(len(after))] ^= 1 << draw.randrange(8)
        path.write_bytes(after)
        problem = in_child(doors[which])
        assert not problem.startswith("RAW"), (path.name, problem)
        try:
            inspected = not describe(directory)["valid"]
        except QALoRAError:
            inspected = True
        counts["found by the door"] += problem != "done"
        counts["found by inspect"] += inspected
        counts["flips"] += 1
        path.write_bytes(before)
        remove(tmp_path / "out")
    print(f"\n{which}: {dict(counts)}")
    assert counts["found by the door"] == counts["found by inspect"] == counts["flips"]
