"""Output directories and files that appear whole or not at all: written beside, synced, renamed."""

import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .manifest import await_checks, write_manifest

_ATTEMPTS = 5
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class _Partial:
    """A hidden sibling of a target that this process works in, held by a lock on it.

    Who writes to a target holds a lock file beside it too, and removes what killed processes left
    behind: their locks went with them.
    """

    _kind = "tmp"  # or "scratch", of which a target may have several

    def __init__(self, target: str | Path, tag: str | None = None) -> None:
        # a link to a directory is followed: it is its target that is replaced
        self.target = _resolved(target)
        tag = tag or f"{self._kind}-{secrets.token_hex(4)}"
        self.partial = self.target.parent / f".{self.target.name}.partial-{tag}"
        self._guard = self.target.parent / f".{self.target.name}.partial-lock"
        self._locks: list[int] = []

    def _begin(self, *, exist_ok: bool = False) -> Path:
        """Make the directory, or find it, and lock it.

        Raises:
            OutputError: another process writes to the target, or the directory cannot be made.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            if self._kind != "scratch":
                self._locks.append(self._lock_target())
                self._remove_abandoned()
            while True:
                self.partial.mkdir(exist_ok=exist_ok)
                descriptor = _lock_existing(self.partial, os.O_RDONLY)
                if descriptor is not None:
                    self._locks.append(descriptor)
                    return self.partial
        except OSError as error:
            self._end(remove=False)
            if isinstance(error, OutputError):
                raise
            raise cannot_write(self.target, error) from error

    def _lock_target(self) -> int:
        for _ in range(_ATTEMPTS):  # another's lock file may just be going
            descriptor = _lock_existing(self._guard, os.O_RDWR | os.O_CREAT)
            if descriptor is not None:
                return descriptor
            time.sleep(0.02)
        raise OutputError(
            f"{self.target}: another process is writing there. Wait for it, stop it, or name "
            "another place."
        )

    def _end(self, *, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.partial, ignore_errors=True)
        if self._locks and self._kind != "scratch":
            self._guard.unlink(missing_ok=True)
        while self._locks:
            os.close(self._locks.pop())

    def _remove_abandoned(self) -> None:
        """Remove siblings whose process is gone; those of interrupted runs to resume stay."""
        for kind in ("tmp", "scratch"):
            for path in self.target.parent.glob(f"{_hidden(self.target)}-{kind}-*"):
                descriptor = None if path.is_symlink() else _lock_existing(path, os.O_RDONLY)
                if descriptor is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(descriptor)


class AtomicDirectory(_Partial):
    """Context manager: write into a hidden sibling of `target`, then rename it into place.

        with AtomicDirectory("out/merged") as partial:
            ...  # write files below `partial`

    On success the manifest of what was written is added, and every file synced before the rename:
    a crash leaves either nothing or all of it. On an exception the partial directory is removed,
    unless `resume_tag` was given: then it stays, and the next run with the same tag finds what was
    written. One process at a time writes to a target.
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
        self._resumable = resume_tag is not None
        super().__init__(target, f"resume-{resume_tag}" if resume_tag else None)
        self._check_target()

    def unfinished(self) -> list[Path]:
        """Return what interrupted runs left for the same target under other tags."""
        found = self.target.parent.glob(f"{_hidden(self.target)}-resume-*")
        return sorted(path for path in found if path != self.partial)

    def _check_target(self) -> None:
        target, parent = self.target, _writable_parent(self.target)
        longest, length = os.pathconf(parent, "PC_NAME_MAX"), len(os.fsencode(self.partial.name))
        if length > longest:
            raise OutputError(
                f"{target}: its name is {length - longest} bytes too long: with what is added to "
                f"it while it is written it may have at most {longest} bytes. Give a shorter one."
            )
        if os.path.lexists(target) and not os.path.isdir(target):
            raise OutputError(f"{target}: is a file. Name a new directory.")
        if os.path.isdir(target) and any(target.iterdir()):
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
        return self._begin(exist_ok=self._resumable)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        done = False
        try:
            if error is None:
                self._check_target()
                write_manifest(self.partial)
                _sync_tree(self.partial)
                await_checks()
                os.rename(self.partial, self.target)
                done = True
                _sync_directory(self.target.parent)
        except OSError as failure:
            if isinstance(failure, OutputError):
                raise
            raise cannot_write(self.target, failure) from failure
        finally:
            self._end(remove=not done and not self._resumable)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise cannot_write(self.target, error) from error


class ScratchDirectory(AtomicDirectory):
    """Context manager: a hidden sibling of `target` to work in, removed at the end.

    Write below it and leave the directory itself in place: its lock says that it is in use.
    """

    _kind = "scratch"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self._end(remove=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise cannot_write(self.target, error) from error


def _hidden(target: Path) -> str:
    """Return how the names of a target's siblings begin, for `glob`."""
    return f".{glob.escape(target.name)}.partial"


def _lock_existing(path: Path, flags: int) -> int | None:
    """Open and lock what has this name; None if another process has it, or has just removed it."""
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if flags & os.O_CREAT:
            raise  # the directory takes no file
        return None
    try:
        if _try_lock(descriptor) and os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def _try_lock(descriptor: int) -> bool:
    """Lock a file or directory for this process; False if another one has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks
    return True


_HELD: dict[Path, int] = {}  # directories that this process has, until it ends


def hold(directory: str | Path) -> None:
    """Keep a directory for this process: of several at once the first may write there.

    Raises:
        OutputError: another process has it.
    """
    path = Path(directory).expanduser().resolve()
    if path in _HELD:
        return
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    if not _try_lock(descriptor):
        os.close(descriptor)
        raise OutputError(
            f"{path}: another process is training into it, and each would overwrite what the other "
            "saves. Wait for it, stop it, or choose another output_dir."
        )
    _HELD[path] = descriptor


def _resolved(target: str | Path) -> Path:
    # unlike `Path.resolve` and `Path.exists` the functions of os.path raise nothing: neither where
    # a link leads to itself nor where a directory may not be looked into
    return Path(os.path.realpath(Path(target).expanduser()))


def _writable_parent(target: Path) -> Path:
    parent = next(p for p in target.parents if os.path.exists(p))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target}: cannot be made, {parent} is not a writable directory.")
    return parent


def check_target(target: str | Path) -> Path:
    """Return the resolved path of a file to make.

    Raises:
        OutputError: something is there already, or the place is not writable.
    """
    path = _resolved(target)
    if os.path.lexists(path):
        raise OutputError(f"{path}: exists. Name a new file; nothing is ever overwritten.")
    _writable_parent(path)
    return path


def check_space(directory: Path, needed: int) -> None:
    """Refuse to begin what does not fit.

    Args:
        directory: where it goes.
        needed: bytes.

    Raises:
        OutputError: fewer are free.
    """
    free = _free_bytes(directory)
    if needed > free:
        raise OutputError(
            f"{directory}: needs {needed} bytes, and {free} bytes are free. Free space or choose "
            "another place."
        )


def _free_bytes(path: Path) -> int:
    existing = next(p for p in (path, *path.parents) if os.path.exists(p))
    return shutil.disk_usage(existing).free


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error that says that a file could not be written, and how much is free."""
    why = error.strerror or str(error)
    if error.errno is None or error.errno in _FULL:  # None: numpy, after writing a part
        why += f"; {_free_bytes(path)} bytes are free there"
    return OutputError(f"{path}: cannot be written ({why}). Free space or choose another place.")


@contextmanager
def saved_by_others(path: Path) -> Iterator[None]:
    """Have a full disk end in our error while another library writes.

    Those in Rust (tokenizers, safetensors) raise errors that are no OSError, and have its number in
    their text: "No space left on device (os error 28)".

    Raises:
        OutputError: the disk is full, or a quota or limit was reached.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno is None or error.errno in _FULL:
            raise cannot_write(path, error) from error
        raise
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))
        if said is None or int(said[1]) not in _FULL:
            raise
        number = int(said[1])
        raise cannot_write(path, OSError(number, os.strerror(number))) from error


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; on success it is synced and becomes `target`.

    It lies in a hidden directory beside `target`. What a killed process left behind is removed by
    the next one that writes to the same target.

    Raises:
        OutputError: `target` appeared meanwhile, another process writes to it, or the disk is full.
    """
    directory = _Partial(target)
    partial = directory._begin() / target.name
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        await_checks()
        check_target(target)
        os.rename(partial, target)
        _sync_directory(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        directory._end(remove=True)


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
