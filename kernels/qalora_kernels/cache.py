"""The user's cache directory, and the one way in which a file in it is written.

It is qalora-plugin/ under XDG_CACHE_HOME, or under ~/.cache.
"""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def path(*parts: str) -> Path:
    """Return a path in the cache directory; nothing is made.

    Raises:
        OSError: the user has no home directory and XDG_CACHE_HOME is not set.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser().absolute().joinpath("qalora-plugin", *parts)
    except RuntimeError as error:  # a user id that no passwd file knows, without HOME
        raise OSError("no home directory is known: set HOME or XDG_CACHE_HOME") from error


def private_directory(name: str) -> Path:
    """Return a directory in the cache that nobody else can have written to; it is made if missing.

    Raises:
        OSError: it cannot be made, or it is not a directory of ours that others cannot write to.
    """
    directory = path(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not (stat.S_ISDIR(found.st_mode) and _is_ours(found)) or found.st_mode & 0o022:
        raise PermissionError(
            f"{directory}: expected a directory of this user's with mode 0700, found one of user "
            f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: remove it"
        )
    if found.st_mode & 0o077:
        directory.chmod(0o700)
    return directory


def read_own(file: Path) -> bytes:
    """Return the content of a regular file of this user's.

    Raises:
        OSError: it cannot be read, is a link, or belongs to another user.
    """
    with open(file, "rb", opener=lambda name, flags: os.open(name, flags | _NO_LINK)) as opened:
        found = os.fstat(opened.fileno())
        if not (stat.S_ISREG(found.st_mode) and _is_ours(found)):
            raise PermissionError(f"{file}: expected a file of this user's: remove it")
        return opened.read()


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == getattr(os, "geteuid", lambda: 0)()  # Windows has no owners here


def write(file: Path, data: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one, never half of one.

    Raises:
        OSError: the directory or the file cannot be written.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=file.parent)
    try:
        with open(handle, "wb") as new:
            new.write(data)
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial)
        raise
