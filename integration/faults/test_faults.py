"""Faults while something is written: kills, full disks, two writers; and what is opened meanwhile.

Three faults of each kind by default; `make faults` makes 200. Each test prints what it counted.
"""

import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import QALoRAError

from .conftest import FULL, NAMES, TIMES
from .processes import FORK, in_child, kill_often, remove, timed

SHARES = (0.3, 0.9, 0.98) if FULL else (0.9,)


@pytest.mark.parametrize("name", NAMES)
def test_kills(name, action_of, draw, tmp_path, show):
    """After SIGKILL at any time the target is absent or whole; the next run ends, and is alone."""
    act, target = action_of(name, tmp_path)
    show(f"{name}: {kill_often(act, target, TIMES, draw)}")


@pytest.mark.skipif(not FULL, reason="an ONNX export takes half a minute: run `make faults`")
def test_kills_of_onnx(models, env_python, run_python, tmp_path, show):
    """The same of the export whose libraries are in an environment of their own."""
    root, script = Path(__file__).parents[2], Path(__file__).with_name("onnx_kills.py")
    path = os.pathsep.join(map(str, (root, root / "kernels")))
    arguments = (script, models.merged, tmp_path, -(-TIMES // 10))
    printed = run_python(env_python("export"), *arguments, PYTHONPATH=path, timeout=None)
    show(f"onnx: {printed.strip().splitlines()[-1]}")


@pytest.mark.parametrize("name", NAMES)
def test_full_disks(name, action_of, draw, tmp_path, show):
    """No file may grow beyond a limit: one error of ours that names bytes, and nothing is left."""
    act, target = action_of(name, tmp_path)
    expected, _ = timed(act, target)
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
    show(f"{name}: {TIMES} limits: {dict(counts)}")


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


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", NAMES)
def test_small_disks(name, share, action_of, small_disk, tmp_path, show):
    """A file system that is too small for all, or for the last files only."""
    act, target = action_of(name, tmp_path)
    expected, _ = timed(act, target)
    disk = small_disk(int(share * sum(map(len, expected.values()))))
    act, target = action_of(name, disk)
    found = in_child(act)
    assert found.startswith("OutputError") and "bytes" in found and "free" in found, found
    assert not target.exists()
    show(f"{name} on {share:.0%} of its space: {found[-90:]}")


@pytest.mark.parametrize("name", NAMES)
def test_two_writers(name, action_of, tmp_path, show):
    """Of several at once to one target one writes, and the others say so."""
    counts, rounds = Counter(), max(1, TIMES // 6)
    for number in range(rounds):
        out = tmp_path / str(number)
        out.mkdir()
        act, target = action_of(name, out)
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
    show(f"{name}: {rounds} rounds of three: {dict(counts)}")


def _report(act, results):
    try:
        act()
        results.put("done")
    except QALoRAError as error:
        results.put(type(error).__name__)
    except BaseException as error:
        results.put(f"RAW {error!r}")


def test_nothing_else_is_opened(models, action_of, trainer, tmp_path, show):
    """Only what was named, the interpreter and its packages, and temporary files are opened."""
    inside = [*models, tmp_path, trainer.args.output_dir]
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
        for name in NAMES:
            action_of(name, tmp_path)[0]()
        describe(models.merged)
        assert not outside, outside[:5]
        (tmp_path / "count").write_text(str(count["opened"]))

    assert in_child(act) == "done"
    show(f"{(tmp_path / 'count').read_text()} files opened, 0 outside of what was given")
