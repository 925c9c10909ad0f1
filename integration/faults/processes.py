"""Actions in forked processes, which may be killed, and what they leave; no pytest is needed."""

import multiprocessing
import shutil
import time
from collections import Counter

from qalora_plugin.errors import QALoRAError

FORK = multiprocessing.get_context("fork")  # at once: nothing is imported again


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


def timed(act, target):
    """Run an action once, and remove what it wrote; return that, and the seconds it took."""
    start = time.monotonic()
    found = in_child(act)
    seconds = time.monotonic() - start
    assert found == "done", found
    expected = content(target)
    remove(target)
    assert not any(target.parent.iterdir())
    return expected, seconds


def kill_often(act, target, times, draw):
    """Kill an action again and again, and run it to its end after each kill.

    Args:
        act: it writes `target`, alone in its folder.
        target: a file or directory.
        times: the number of kills.
        draw: a random generator, for when to kill.

    Returns:
        Counts of what was seen.

    Raises:
        AssertionError: a target is torn, the next run fails, or something is left behind.
    """
    expected, first = timed(act, target)
    seconds = min(first, timed(act, target)[1])  # the first one reads the code of the action
    counts = Counter(kills=times)
    for _ in range(times):
        counts["ended"] += killed_after(act, draw.uniform(0, seconds))
        if target.exists():
            counts["whole"] += 1
            assert content(target) == expected, "a torn target"
            remove(target)
        else:
            counts["absent"] += 1
        counts["left for the next run"] += bool(list(target.parent.iterdir()))
        found = in_child(act)
        assert found == "done", found
        assert content(target) == expected
        remove(target)
        assert not list(target.parent.iterdir()), "something is left behind"
    return dict(counts)
