"""Ranks that wait for rank 0, with real processes over gloo."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from qalora_plugin.distributed import ranks
from qalora_plugin.errors import OutputError

FORK = multiprocessing.get_context("fork")  # importing everything again would take long


def _run(number, folder, port, work, size):
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    file = (folder / f"{number}.log").open("w")
    os.dup2(file.fileno(), 2)
    sys.stderr = file
    logging.basicConfig(level=logging.INFO, stream=file, format="%(message)s", force=True)
    try:
        work(number)
    except BaseException:
        traceback.print_exc()
        file.flush()
        os._exit(1)
    os._exit(0)


def _launch(folder, work, size=3):
    """Return exit status and stderr of every rank; fail where one has not ended after 40 s."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        FORK.Process(target=_run, args=(number, folder, port, work, size)) for number in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 40
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert not any(process.is_alive() for process in processes), "ranks hang"
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode or 0 for process in processes]
    return codes, [(folder / f"{number}.log").read_text() for number in range(size)]


def _group():
    torch.distributed.init_process_group("gloo")


def test_one_rank_works_and_the_others_wait(tmp_path):
    def work(number):
        ranks._REMIND = 0.8
        _group()
        for _ in range(2):
            before = time.monotonic()
            ranks.on_main_process(
                lambda: (time.sleep(2), _note(tmp_path, number)), "merging", "not merged"
            )
            assert time.monotonic() - before > 1.9

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, 0, 0], logs
    assert (tmp_path / "notes").read_text() == "00"
    assert "waits" not in logs[0]
    for number in (1, 2):  # at once, and again from time to time, in both calls
        lines = logs[number].splitlines()
        said = f"rank {number} waits for rank 0, which is merging (for 0 minutes now)"
        assert 4 <= lines.count(said) == len(lines) <= 6


def _note(folder, number):
    with (folder / "notes").open("a") as file:
        file.write(str(number))


def test_connected_ranks_meet_when_the_process_group_is_gone(tmp_path):
    def work(number):
        _group()
        ranks.connect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if number == 0:
            time.sleep(1)  # the others come first
        ranks.on_main_process(lambda: _note(tmp_path, number), "merging", "not merged")
        assert (tmp_path / "notes").read_text() == "0"

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, 0, 0], logs


def test_ranks_without_a_process_group_make_one(tmp_path):
    def work(number):
        PartialState._reset_state()  # of a training in the process that this one is a copy of
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
        ranks.on_main_process(lambda: _note(tmp_path, number), "quantizing", "not quantized")
        assert (tmp_path / "notes").read_text() == "0"

    codes, logs = _launch(tmp_path, work, 2)
    assert codes == [0, 0], logs


@pytest.mark.parametrize("error", [ValueError("the disk is full"), KeyboardInterrupt()])
def test_a_failure_is_raised_on_every_rank(error, tmp_path):
    message = str(error) or "interrupted"

    def fail():
        raise error

    def work(number):
        _group()
        own = type(error) if number == 0 and message == "interrupted" else OutputError
        with pytest.raises(own, match=None if own is not OutputError else f"lost: {message}"):
            ranks.on_main_process(fail, "merging", "lost")
        # and they are in step again
        ranks.on_main_process(lambda: _note(tmp_path, number), "merging", "lost")

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, 0, 0], logs
    assert (tmp_path / "notes").read_text() == "0"


def test_rank_0_is_killed_while_the_others_wait(tmp_path):
    def work(number):
        _group()
        ranks.connect()
        torch.distributed.barrier()
        ranks.on_main_process(lambda: os.kill(os.getpid(), signal.SIGKILL), "merging", "not merged")

    codes, logs = _launch(tmp_path, work)
    assert codes == [-signal.SIGKILL, 1, 1]
    for log in logs[1:]:
        assert "RankError: rank 0 stopped, or cannot be reached any more, while it was merg" in log


def test_rank_0_does_not_wait_for_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_GRACE", 1.0)

    def work(number):
        _group()
        ranks.connect()
        torch.distributed.barrier()
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.on_main_process(lambda: _note(tmp_path, number), "merging", "not merged")

    codes, logs = _launch(tmp_path, work)
    assert codes == [0, -signal.SIGKILL, 0], logs
    assert (tmp_path / "notes").read_text() == "0"


def test_rank_0_that_cannot_be_reached(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("timed out")

    def work(number):
        _group()
        if number == 1:
            monkeypatch.setattr(ranks, "TCPStore", refuse)
        ranks.connect()

    codes, logs = _launch(tmp_path, work, 2)
    assert codes == [0, 1]
    assert "RankError: rank 0 stopped, or cannot be reached" in logs[1]
    assert "connected to localhost, on any port (timed out)" in logs[1]


def test_one_process_works_alone():
    done: list[int] = []
    ranks.on_main_process(lambda: done.append(ranks.rank()), "merging", "not merged")
    assert done == [0] and ranks.connect() is None
    with pytest.raises(OutputError, match="not merged: division by zero"):
        ranks.on_main_process(lambda: print(1 / 0), "merging", "not merged")
