"""What only one of several ranks does, while the others wait for it.

The ranks meet at a store of their own, which rank 0 keeps, and not in a collective: so a merge may
take longer than the time-outs of NCCL and gloo, and is possible after the process group is gone.
The launcher (torchrun, accelerate launch) ends the other ranks where one of them dies.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from ..errors import OutputError, RankError

_POLL = 0.2  # seconds between two looks at the store
_REMIND = 300.0  # seconds between two messages of a rank that waits
_GRACE = 60.0  # seconds that rank 0 gives the others to read how its work ended
_CONNECT = timedelta(seconds=60)
_log = logging.getLogger(__name__)


def rank() -> int:
    """Return this process's number, 0 where there is one process."""
    group = torch.distributed
    return group.get_rank() if group.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that train together."""
    group = torch.distributed
    size = os.environ.get("WORLD_SIZE", "1")
    return group.get_world_size() if group.is_initialized() else int(size)


@dataclass
class _Ranks:
    """The connected ranks, numbered as in the process group."""

    store: TCPStore
    rank: int
    size: int
    calls: int = 0  # of on_main_process, the same on every rank

    def tell(self, message: str) -> None:
        """Tell the others how the work ended, and wait until they have read it.

        The store is gone when this process ends.
        """
        self.store.set(f"{self.calls}", message)
        read = [f"{self.calls}/{number}" for number in range(1, self.size)]
        deadline = time.monotonic() + _GRACE  # one that has died will never read it
        while not self.store.check(read) and time.monotonic() < deadline:
            time.sleep(_POLL)

    def wait(self, doing: str) -> str:
        """Wait for what rank 0 tells: how its work failed, or nothing where it succeeded."""
        start = due = time.monotonic()
        level = logging.INFO
        while not self.store.check([f"{self.calls}"]):
            if time.monotonic() >= due:
                minutes = (time.monotonic() - start) / 60
                text = "rank %d waits for rank 0, which is %s (for %.0f minutes now)"
                _log.log(level, text, self.rank, doing, minutes)
                level, due = logging.WARNING, due + _REMIND
            time.sleep(_POLL)
        message = self.store.get(f"{self.calls}").decode()
        self.store.set(f"{self.calls}/{self.rank}", "")
        return message


_ranks: _Ranks | None = None


def connect() -> _Ranks | None:
    """Connect the ranks for `on_main_process`, once; all of them have to call.

    Call it where `on_main_process` comes after the end of the process group.

    Returns:
        The connected ranks; None where there is only one.

    Raises:
        RankError: rank 0 cannot be reached.
    """
    global _ranks
    if _ranks is not None or world_size() == 1:
        return _ranks
    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState()
    host, port, store = os.environ.get("MASTER_ADDR", "localhost"), [0], None
    with _rank_0_reached(f"the ranks connected to {host}, on any port"):
        if rank() == 0:
            store = TCPStore(host, 0, None, True, _CONNECT, wait_for_workers=False)
            port = [store.port]
        torch.distributed.broadcast_object_list(port, src=0)
        store = store or TCPStore(host, port[0], None, False, _CONNECT, wait_for_workers=False)
    _ranks = _Ranks(store, rank(), world_size())
    return _ranks


@contextmanager
def _rank_0_reached(when: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"rank 0 stopped, or cannot be reached any more, while {when} ({error}). Nothing that "
            "was saved is lost: look at the output of rank 0, then start again (from the last "
            "checkpoint)"
        ) from error


def on_main_process(work: Callable[[], None], doing: str, failed: str) -> None:
    """Run `work` on rank 0 while the others wait; all ranks have to call.

    Args:
        work: what only one process may do; it may take hours.
        doing: what that is, for messages: "merging".
        failed: what to say where it fails; the error's message follows.

    Raises:
        OutputError: `work` raised, on every rank.
        RankError: rank 0 has died meanwhile, or cannot be reached.
    """
    ranks = connect()
    if ranks is not None:
        ranks.calls += 1
        if ranks.rank != 0:
            with _rank_0_reached(f"it was {doing}"):
                message = ranks.wait(doing)
            if message:
                raise OutputError(f"{failed}: {message}")
            return
    message = "interrupted"
    try:
        work()
        message = ""
    except Exception as error:
        message = str(error) or repr(error)
        raise OutputError(f"{failed}: {message}") from error
    finally:
        if ranks is not None:
            ranks.tell(message)
