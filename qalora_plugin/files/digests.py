"""Hashes of whole files: XXH3-128, and SHA-256 of what earlier releases wrote.

XXH3 (of the `xxhash` library) finds accidents as surely as SHA-256 does, and costs less. It is
no signature: who can replace a file on purpose can replace the hash beside it too.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from ..errors import CheckpointError
from .inside import check_regular, open_regular

XXH3 = "xxh3_128"  # the key of an entry, as the next one
SHA256 = "sha256"
_NEW: dict[str, Callable[[], Any]] = {XXH3: xxhash.xxh3_128, SHA256: hashlib.sha256}
_TITLES = {XXH3: "XXH3-128", SHA256: "SHA-256"}
_PIECE = 1 << 20  # of a file, hashed at a time: it stays in a core's cache
_RACY = 50_000_000  # ns: a file so young may change again without a newer time stamp

_Key = tuple[int, int, int, int, str]
_known: dict[_Key, str] = {}


def file_digest(path: Path, algorithm: str = XXH3) -> str:
    """Return the hash of a file, as hex digits; a file that has not changed is read once.

    Args:
        path: the file.
        algorithm: XXH3 or SHA256.
    """
    key = _key(path, algorithm)
    if key not in _known:
        young = time.time_ns() - key[3] < _RACY
        digest, buffer = _NEW[algorithm](), memoryview(bytearray(min(key[2] + 1, _PIECE)))
        with open_regular(path) as file:
            while count := file.raw.readinto(buffer):
                digest.update(buffer[:count])
        if young:
            return digest.hexdigest()
        _known[key] = digest.hexdigest()
    return _known[key]


def file_entry(path: Path) -> dict[str, Any]:
    """Return what is written about a file: its size in bytes, and its hash."""
    digest = file_digest(path)
    return {"size": path.stat().st_size, XXH3: digest}


def check_entries(files: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Check that every entry has a hash.

    Raises:
        CheckpointError: one has none that this release knows.
    """
    for name, entry in files.items():
        if not _NEW.keys() & entry.keys():
            raise CheckpointError(
                f"{where}.{name!a}: expected {' or '.join(_NEW)}, found {sorted(entry)}"
            )


def changed(path: Path, entry: Mapping[str, Any], where: str) -> str:
    """Compare a file with the hash of its entry.

    Returns:
        Nothing if they agree; else the hash that was found, and the one that is said `where`.
    """
    algorithm = next(name for name in _NEW if name in entry)
    found, stated = file_digest(path, algorithm), entry[algorithm]
    return "" if found == stated else f"{_TITLES[algorithm]} {found}, {where} says {stated!a}"


class WrittenHash:
    """The hash of a file that is being written: a thread hashes what is complete so far.

    Pieces may come in any order; those behind a gap wait until it is filled.
    """

    def __init__(self, file: FileIO) -> None:
        """Begin at the file's start; it has to be open for reading too, until `finish` or `drop`.

        Args:
            file: the file, unbuffered.
        """
        self._file = file
        self._digest = _NEW[XXH3]()
        self._pool = ThreadPoolExecutor(1)
        self._buffer = memoryview(bytearray(_PIECE))
        self._jobs: list[Future[None]] = []
        self._behind: dict[int, int] = {}  # end of each piece behind a gap, by its start
        self._written = self._given = 0

    def wrote(self, start: int, stop: int) -> None:
        """Take note of a piece that has been written, and will not be written again."""
        if start < stop:
            self._behind[start] = stop
        while self._written in self._behind:
            self._written = self._behind.pop(self._written)
        if self._written - self._given >= _PIECE:
            self._give()

    def _give(self) -> None:
        self._jobs.append(self._pool.submit(self._update, self._given, self._written))
        self._given = self._written

    def _update(self, start: int, stop: int) -> None:
        while start < stop:
            view = self._buffer[: min(_PIECE, stop - start)]
            count = os.preadv(self._file.fileno(), [view], start)
            if not count:
                raise OSError(errno.EIO, "it became shorter while it was written")
            self._digest.update(view[:count])
            start += count

    def finish(self, path: Path) -> None:
        """Wait for the thread, and remember the hash for the manifest.

        Args:
            path: the file's name now; a rename keeps what is remembered.

        Raises:
            OSError: the file cannot be read back.
        """
        self._give()
        with self._pool:
            for job in self._jobs:
                job.result()
        key = _key(path, XXH3)
        if key[2] == self._written:  # else the file has a gap, and is read once it is asked for
            _known[key] = self._digest.hexdigest()

    def drop(self) -> None:
        """Stop the thread; the file may be closed then."""
        self._pool.shutdown(cancel_futures=True)


def _key(path: Path, algorithm: str) -> _Key:
    found = check_regular(path)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, algorithm)
