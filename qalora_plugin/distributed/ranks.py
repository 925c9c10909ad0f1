"""Several ranks: what only one of them does, and how the others learn that one has died.

Every rank says every two seconds, through a store of its own beside the process group, that it
lives and what it is doing, and looks at the others. So a rank that waits (for another's merge, or
in a collective that will never end) stops within `SILENCE` seconds, with an error that names the
rank and the cause; and a long merge on one rank runs into no time-out of NCCL or gloo.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore

from ..errors import OutputError, RankError

INTERVAL = 2.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which a rank counts as dead."""
GRACE = 10.0
"""Seconds that a rank has to stop by itself when another has died, before it is ended."""
_POLL = 0.2


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes that train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


class Watch:
    """Shows that this rank lives, and watches the others; see `watch`."""

    def __init__(self) -> None:
        """Connect to the other ranks; all of them have to call.

        Raises:
            RankError: rank 0 has died already.
        """
        distributed = torch.distributed
        if not distributed.is_initialized():
            from accelerate import PartialState

            PartialState()
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._state: dict[str, Any] = {
            "beat": 0,
            "host": socket.gethostname(),
            "processes": _process_table(),
            "pid": os.getpid(),
            "doing": "training",
            "failed": None,
            "ended": False,
        }
        self.others: dict[int, dict[str, Any]] = {}
        self._store = self._connect()
        self._lock = threading.Lock()  # a store's connection serves one thread at a time
        self._seen: dict[int, tuple[int, float]] = {}
        self._done = threading.Event()
        self._calls = 0
        self.cause: str | None = None
        """Why the ranks cannot go on, once that is known."""
        self._publish()
        self._plain_hook = sys.excepthook
        sys.excepthook = self._on_exception
        atexit.register(self._on_exit)
        threading.Thread(target=self._run, daemon=True, name="qalora-ranks").start()

    def _connect(self) -> TCPStore:
        host = os.environ.get("MASTER_ADDR", "localhost")
        timeout = timedelta(seconds=GRACE)
        store, port = None, 0
        if self.rank == 0:
            store = TCPStore(host, 0, None, True, timeout, wait_for_workers=False)
            port = store.port
        found: list[Any] = [None] * self.size
        try:
            torch.distributed.all_gather_object(found, (self._state, port))
            states = dict(enumerate(state for state, _ in found))
            self.others = {n: state for n, state in states.items() if n != self.rank}
            port = found[0][1]
            return store or TCPStore(host, port, None, False, timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise RankError(_story(0, {}, f"cannot be reached ({error})")) from error

    def run_once(self, work: Callable[[], None], doing: str, failed: str) -> None:
        """See `on_main_process`."""
        self._calls += 1
        key = f"once/{self._calls}"
        before = self._state["doing"]
        self._state["doing"] = doing if self.rank == 0 else f"waiting for rank 0 ({doing})"
        with contextlib.suppress(RuntimeError):  # the thread says why it cannot
            self._publish()
        if self.rank != 0:
            self.others[0] = self.others[0] | {"doing": doing}
            message = self._wait_for(key)
            self._state["doing"] = before
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
            self._state["doing"] = before
            with self._lock:
                self._store.set(key, message)

    def _wait_for(self, key: str) -> str:
        while True:
            with contextlib.suppress(RuntimeError), self._lock:
                if self._store.check([key]):
                    return self._store.get(key).decode()
            if self.cause is not None:
                raise RankError(self.cause)
            time.sleep(_POLL)

    def stop(self) -> None:
        """Watch no more. Rank 0, which keeps the store, waits for the others to say so too."""
        self._leave({"ended": True})
        atexit.unregister(self._on_exit)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._plain_hook
        deadline = time.monotonic() + SILENCE
        while self.rank == 0 and time.monotonic() < deadline and self._look() is None:
            if all(self.others.get(n, {}).get("ended") for n in range(1, self.size)):
                return
            time.sleep(_POLL)

    def _leave(self, last: dict[str, Any]) -> None:
        self._done.set()
        self._state |= last
        with contextlib.suppress(RuntimeError):
            self._publish()

    def _publish(self) -> None:
        self._state["beat"] += 1
        with self._lock:
            self._store.set(f"rank/{self.rank}", json.dumps(self._state))

    def _run(self) -> None:
        while self.cause is None and not self._done.wait(INTERVAL):
            self.cause = self._look(publish=True)
        if self._done.wait(GRACE):
            return
        print(f"rank {self.rank} stops: {self.cause}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # the main thread hangs in a collective

    def _look(self, publish: bool = False) -> str | None:
        """Read the other ranks' states; why the ranks cannot go on, or None."""
        # before their states are read: a rank that failed or ended says so first
        gone = {n for n, state in self.others.items() if not self._is_alive(state)}
        try:
            if publish:
                self._publish()
            for number in range(self.size):
                key = f"rank/{number}"
                with self._lock:
                    if number != self.rank and self._store.check([key]):
                        self.others[number] = json.loads(self._store.get(key))
        except RuntimeError:
            state = self.others.get(0, {})
            killed = state and not self._is_alive(state)
            what = "was killed" if killed else "cannot be reached any more"
            return None if state.get("ended") else _story(0, state, what)
        for number, state in self.others.items():
            if state["failed"]:
                return _story(number, state, f"failed ({state['failed']})")
            if state["ended"]:
                continue
            if number in gone:
                return _story(number, state, "was killed")
            beat, since = self._seen.get(number, (-1, 0.0))
            now = time.monotonic()
            if state["beat"] != beat:
                self._seen[number] = (state["beat"], now)
            elif now - since > SILENCE:
                return _story(number, state, f"has shown no sign of life for {SILENCE:.0f} s")
        return None

    def _is_alive(self, state: dict[str, Any]) -> bool:
        """False where the process is known to be gone: /proc here would show it."""
        table = self._state["processes"]
        return table is None or state["processes"] != table or _is_alive(state["pid"])

    def _on_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """The last thing before an uncaught exception ends this rank: who is to blame?"""
        self._plain_hook(kind, error, trace)
        if os.getpid() != self._state["pid"] or self._done.is_set():
            return
        deadline = time.monotonic() + 2 * INTERVAL
        while self.cause is None and time.monotonic() < deadline:
            time.sleep(_POLL)  # a broken connection is noticed before the thread looks again
        if self.cause is not None and not isinstance(error, RankError):
            print(f"rank {self.rank} stops: {self.cause}", file=sys.stderr, flush=True)
        self._leave({"failed": self.cause or f"{kind.__name__}: {error}"[:500]})
        if self.rank == 0:
            time.sleep(2 * INTERVAL)  # the store goes with this process: let the others read it

    def _on_exit(self) -> None:
        if os.getpid() == self._state["pid"] and not self._done.is_set():
            self._leave({"ended": True})


def _story(number: int, state: dict[str, Any], what: str) -> str:
    where = f" (process {state['pid']} on {state['host']})" if state else ""
    doing = f" while {state['doing']}" if state else ""
    return (
        f"rank {number}{where} {what}{doing}. Nothing that was saved is lost: look at that rank's "
        "output, then start again (from the last checkpoint)"
    )


def _process_table() -> str | None:
    """What names the processes that /proc shows, or None where there is no telling.

    A host name does not: containers may share it, and see each their own processes.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    except OSError:
        return True  # no telling
    return state not in ("Z", "X")


_current: Watch | None = None


def watch() -> Watch | None:
    """Watch the other ranks from now to `unwatch`; all ranks have to call. None with one rank."""
    global _current
    if _current is None and world_size() > 1:
        _current = Watch()
    return _current


def unwatch() -> None:
    """Watch no more; all ranks have to call."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def on_main_process(work: Callable[[], None], doing: str, failed: str) -> None:
    """Run `work` on rank 0 while the others wait; all ranks have to call.

    Args:
        work: what only one process may do.
        doing: what that is, for messages: "merging".
        failed: what to say where it fails; the error's message follows.

    Raises:
        OutputError: `work` raised, on every rank.
        RankError: rank 0, or another, has died meanwhile.
    """
    if world_size() == 1:
        try:
            work()
        except Exception as error:
            raise OutputError(f"{failed}: {error}") from error
        return
    watched = _current is not None
    current = watch()
    assert current is not None
    try:
        current.run_once(work, doing, failed)
    finally:
        if not watched:
            unwatch()
