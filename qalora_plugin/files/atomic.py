"""Output directories and files that appear whole or not at all: written beside, synced, renamed."""

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .manifest import write_manifest


class AtomicDirectory:
    """Context manager: write into a hidden sibling of `target`, then rename it into place.

        with AtomicDirectory("out/merged") as partial:
            ...  # write files below `partial`

    On success the manifest of what was written is added, and every file synced before the rename:
    a crash leaves either nothing or all of it. On an exception the partial directory is removed,
    unless `resume_tag` was given: then it stays, and the next run with the same tag finds what was
    written. What a killed process left behind is removed by the next one that writes to the same
    target.
    """

    def __init__(self, target: str | Path, resume_tag: str | None = None) -> None:
        """Check the target; nothing is written yet.

        Args:
            target: the directory to make. It must not exist, or be empty.
            resume_tag: names a partial directory that outlives a failure (letters, digits, `-`).
                Use what identifies the work, such as a hash of its inputs.

        Raises:
            OutputError: the target is a file, not empty, a mount point, or not writable, or its
                name is too long.
        """
        # a link to a directory is followed: it is its target that is replaced
        self.target = Path(target).expanduser().resolve()
        self._resumable = resume_tag is not None
        suffix = f"resume-{resume_tag}" if resume_tag else f"tmp-{secrets.token_hex(4)}"
        self.partial = self.target.parent / f".{self.target.name}.partial-{suffix}"
        self._lock: int | None = None
        self._check_target()

    def unfinished(self) -> list[Path]:
        """Return what interrupted runs left for the same target under other tags."""
        found = self.target.parent.glob(f".{glob.escape(self.target.name)}.partial-resume-*")
        return sorted(path for path in found if path != self.partial)

    def _check_target(self) -> None:
        target, parent = self.target, _writable_parent(self.target)
        longest, length = os.pathconf(parent, "PC_NAME_MAX"), len(os.fsencode(self.partial.name))
        if length > longest:
            raise OutputError(
                f"{target}: its name is {length - longest} bytes too long: with what is added to "
                f"it while it is written it may have at most {longest} bytes. Give a shorter one."
            )
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target}: is a file. Name a new directory.")
        if target.is_dir() and any(target.iterdir()):
            raise OutputError(
                f"{target}: is not empty. Name a new directory; nothing is ever overwritten."
            )
        if os.path.ismount(target):
            raise OutputError(
                f"{target}: is a mount point, which cannot be renamed into place. "
                f"Name a directory inside it, such as {target / 'model'}."
            )

    def __enter__(self) -> Path:
        """Make the partial directory (or find it, when resuming) and return it."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        self.partial.mkdir(exist_ok=self._resumable)
        self._lock = os.open(self.partial, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise OutputError(
                f"{self.partial}: another process is writing there. Wait for it, or stop it."
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._check_target()
                write_manifest(self.partial)
                _sync_tree(self.partial)
                os.rename(self.partial, self.target)
                _sync_directory(self.target.parent)
        except BaseException:
            kind = OutputError
            raise
        finally:
            if kind is not None and not self._resumable:
                shutil.rmtree(self.partial, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)

    def _remove_abandoned(self) -> None:
        """Remove temporary siblings whose process is gone (its lock went with it)."""
        for path in self.target.parent.glob(f".{glob.escape(self.target.name)}.partial-tmp-*"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                pass  # in use, or no telling
            finally:
                os.close(descriptor)


class ScratchDirectory(AtomicDirectory):
    """Context manager: a hidden sibling of `target` to work in, removed at the end.

    Write below it and leave the directory itself in place: its lock says that it is in use. What a
    killed process left behind is removed by the next one that writes to the same target.
    """

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _writable_parent(target: Path) -> Path:
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: cannot be made, {parent} is not a writable directory.")
    return parent


def check_target(target: str | Path) -> Path:
    """Return the resolved path of a file to make.

    Raises:
        OutputError: something is there already, or the place is not writable.
    """
    path = Path(target).expanduser().resolve()
    if path.exists():
        raise OutputError(f"{path}: exists. Name a new file; nothing is ever overwritten.")
    _writable_parent(path)
    return path


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error that says that a file could not be written."""
    return OutputError(
        f"{path}: cannot be written ({error.strerror}). Free space or choose another place."
    )


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
        _sync_directory(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def replace_file(new: Path, target: Path) -> None:
    """Give a finished file its name; what had this name before is replaced at once."""
    os.replace(new, target)


def replace_text(target: Path, text: str) -> None:
    """Write a small text file that a reader sees whole at any time, the old one or the new one."""
    new = target.with_name(target.name + ".part")
    new.write_text(text, encoding="utf-8")
    replace_file(new, target)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(root))
