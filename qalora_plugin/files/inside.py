"""Which files may be read, copied or sent: regular ones that lie in the directory that was given.

A model from elsewhere may hold links to private files, pipes and devices. Links are followed as far
as the directory goes. The Hub's cache is the one place where they leave it: a snapshot's files are
links to the blobs beside it (huggingface_hub, "Understand caching").
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from ..errors import CheckpointError

_TRUST = "Copy the file itself there, if you trust where the directory comes from."
_LARGE = 1 << 28  # bytes from which a file with holes is refused
_HOLES = 8  # a file system that compresses makes weights smaller, but not by this much


def root_of(directory: Path) -> Path:
    """Return the resolved directory that files may lie in: for a snapshot the repository's folder.

    Args:
        directory: of a model or an adapter.
    """
    real = Path(os.path.realpath(directory))
    for folder in (real, *real.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return folder.parent
    return real


def in_hub_cache(directory: Path) -> bool:
    """Say whether a directory is a snapshot in the Hub's cache, where files may be missing."""
    return root_of(directory) != Path(os.path.realpath(directory))


def check_inside(path: Path, directory: Path) -> None:
    """Refuse a file that is not in the directory, once links are followed.

    Raises:
        CheckpointError: names the file, and where it leads.
    """
    real, root = os.path.realpath(path), root_of(directory)
    if not Path(real).is_relative_to(root):
        raise CheckpointError(
            f"{path}: leads out of its directory, to {real}. Nothing outside of it is read, copied "
            f"or sent. {_TRUST}"
        )


def check_regular(path: Path, directory: Path | None = None) -> os.stat_result:
    """Refuse what is no regular file of a directory, by default its own; nothing is opened.

    Raises:
        CheckpointError: it is missing, a directory, a pipe or a device, leads out of the directory,
            or is so sparse that most of it was never written.
    """
    check_inside(path, path.parent if directory is None else directory)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file, found {_kind(status.st_mode)}.")
    blocks = getattr(status, "st_blocks", 0) * 512  # 0 where the file system does not count
    if 0 < blocks < status.st_size / _HOLES and status.st_size > _LARGE:
        raise CheckpointError(
            f"{path}: has {status.st_size} bytes, of which {blocks} are on the disk: the rest was "
            "never written. Download or copy it again."
        )
    return status


def open_regular(path: Path, directory: Path | None = None) -> BufferedReader:
    """Open a file for reading, once `check_regular` has passed it; a pipe never blocks.

    Raises:
        CheckpointError: see `check_regular`, or it cannot be read.
    """
    check_regular(path, directory)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise _unreadable(path, error) from error
    return os.fdopen(descriptor, "rb")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    why = getattr(error, "strerror", None) or error
    return CheckpointError(f"{path}: cannot be read ({why}). Download or copy it again.")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
