"""An output file that appears whole or not at all; `AtomicDirectory`'s like for one file."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError


def check_target(target: str | Path) -> Path:
    """The resolved path of a file to make.

    Raises:
        OutputError: something is there already, or the place is not writable.
    """
    path = Path(target).expanduser().resolve()
    if path.exists():
        raise OutputError(f"{path}: exists. Name a new file; nothing is ever overwritten.")
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be made, {parent} is not a writable directory.")
    return path


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; on success it is synced and renamed.

    Raises:
        OutputError: `target` appeared meanwhile, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-tmp-{secrets.token_hex(4)}")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        check_target(target)
        os.rename(partial, target)
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target}: cannot be written ({error.strerror}). Free space or choose another place."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
