"""Ranks that wait for each other, and that die, with real processes over gloo."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qalora_plugin.distributed import ranks
from qalora_plugin.errors import OutputError

FORK = multiprocessing.get_context("fork")  # importing everything again would take long


def _run(number: int, folder: Path, port: int, work: Callable[[int], None], size: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    ranks.INTERVAL, ranks.GRACE, ranks.SILENCE = 0.1, 1.0, 1.5
    file = (folder / f"{number}.log").open("w")
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    torch.distributed.init_process_group("gloo", rank=number, world_size=size)
    try:
        work(number)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        file.flush()
        os._exit(1)
    os._exit(0)


def _launch(
    folder: Path, work: Callable[[int], None], size: int = 3
) -> tuple[list[int], list[str]]:
    """Exit status and stderr of every rank; fails where one has not ended after 40 s."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        FORK.Process(target=_run, args=(number, folder, port, work, size)) for number in range(size)
    ]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + 40
        while any(process.is_alive() for process in processes):
            stopped = [p for p in processes if p.is_alive()]
            assert time.monotonic() < deadline, f"{len(stopped)} ranks hang"
            if len(stopped) == 1 and all(
                p.exitcode is not None for p in processes if p not in stopped
            ):
                os.kill(stopped[0].pid or 0, signal.SIGCONT)  # the one that stopped itself
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode or 0 for process in processes]
    return codes, [(folder / f"{number}.log").read_text() for number in range(size)]


def test_one_rank_works_and_the_others_wait(tmp_path: Path) -> None:
    def work(number: int) -> None:
        ranks.watch()
        for _ in range(2):
            before = time.monotonic()
            ranks.on_main_process(lambda: time.sleep(2.5), "merging", "not merged")
            assert time.monotonic() - before > 2.4  # longer than SILENCE: a long merge is no death
            with (tmp_path / "done").open("a") as file:
                file.write(str(number))
        ranks.unwatch()

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, 0, 0], logs
    assert sorted((tmp_path / "done").read_text()) == sorted("012" * 2)


def test_a_failure_is_raised_on_every_rank(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("the disk is full")

    def work(number: int) -> None:
        with pytest.raises(OutputError, match="not merged: the disk is full"):
            ranks.on_main_process(fail, "merging", "not merged")

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, 0, 0], logs


def test_rank_0_is_killed_while_the_others_wait(tmp_path: Path) -> None:
    def work(number: int) -> None:
        def merge() -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        ranks.on_main_process(merge, "merging", "not merged")

    codes, logs = _launch(tmp_path, work)
    assert codes == [-signal.SIGKILL, 1, 1]
    for log in logs[1:]:
        assert "RankError: rank 0" in log


def test_a_killed_rank_ends_one_that_hangs_in_a_collective_or_works(tmp_path: Path) -> None:
    def work(number: int) -> None:
        ranks.watch()
        if number == 2:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # stands for a collective of a backend that does not notice

    codes, logs = _launch(tmp_path, work)
    assert codes == [1, 1, -signal.SIGKILL]
    for number in (0, 1):
        assert f"rank {number} stops: rank 2 (process" in logs[number]
        assert "was killed while training" in logs[number]


def test_a_silent_rank_counts_as_dead(tmp_path: Path) -> None:
    def work(number: int) -> None:
        ranks.watch()
        if number == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)

    codes, logs = _launch(tmp_path, work)
    assert codes[0] == codes[2] == 1
    assert "has shown no sign of life for 2 s while training" in logs[0]


@pytest.mark.parametrize("table", ["another container's", None])
def test_a_rank_whose_process_cannot_be_seen_is_alive_by_its_signs_of_life(
    table: str | None, tmp_path: Path
) -> None:
    def work(number: int) -> None:
        own = ranks._process_table()
        assert own is not None and own == ranks._process_table()
        if number == 1 or table is None:  # same host name, another PID namespace, or no /proc
            ranks._process_table = lambda: table
        if number == 1:
            real = os.getpid
            os.getpid = lambda: 4190000  # means nothing to the others
            watch = ranks.watch()
            os.getpid = real
            assert watch is not None
        else:
            ranks.watch()
        time.sleep(0.5)  # many looks at each other
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    codes, logs = _launch(tmp_path, work)
    assert codes == [1, -signal.SIGKILL, 1]
    for number in (0, 2):
        assert "rank 1 (process 4190000" in logs[number]
        assert "has shown no sign of life for 2 s while training" in logs[number]


def test_an_exception_on_one_rank_is_named_by_the_others(tmp_path: Path) -> None:
    def work(number: int) -> None:
        ranks.watch()
        if number == 1:
            raise ValueError("a row without text")
        torch.distributed.barrier()  # gloo: "Connection closed by peer"

    codes, logs = _launch(tmp_path, work)
    assert codes == [1, 1, 1]
    for number in (0, 2):
        assert "failed (ValueError: a row without text) while training" in logs[number]
