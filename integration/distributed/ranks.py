"""Ranks of one machine, forked from a process that has imported what they need.

Importing TRL, Axolotl and DeepSpeed takes longer than any of the runs. Like `srun` or `mpirun`,
nothing here ends the ranks that outlive another.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

FORK = multiprocessing.get_context("fork")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def rank_main(number, ranks, port, log, work):
    """Run one rank with its environment, log and exit status; with port 0 it is alone."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    if port:
        os.environ |= {key: str(value) for key, value in place.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open(f"{log}.{number}", "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def launch(log, ranks, work, *, grouped=False):
    """Run `work` in every rank; return how each ended, and how long the last outlived a kill.

    One rank alone has no process group, unless it is `grouped`. Rank N writes to `LOG.N`.
    """
    port = free_port() if ranks > 1 or grouped else 0
    processes = [
        FORK.Process(target=rank_main, args=(number, ranks, port, log, work))
        for number in range(ranks)
    ]
    for process in processes:
        process.start()
    killed, deadline = None, time.monotonic() + 480
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if killed is None and any(p.exitcode == -signal.SIGKILL for p in processes):
            killed = time.monotonic()
        time.sleep(0.02)
    seconds = None if killed is None else round(time.monotonic() - killed, 1)
    hung = [number for number, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    texts = [Path(f"{log}.{number}").read_text(errors="replace") for number in range(ranks)]
    codes = [process.exitcode for process in processes]
    return {"codes": codes, "hung": hung, "seconds_after_kill": seconds, "logs": texts}
