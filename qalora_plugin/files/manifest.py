"""qalora_manifest.json: what is in a directory, so that nearly any flipped bit is found.

    files   size in bytes and XXH3-128 of every file: weights, tokenizer, chat template, generation
            config, licence, code. Not of README.md and hidden files, which no program reads.
    bound   of config.json and adapter_config.json the part that can change numbers (`binding`),
            as their harmless keys may be edited

Earlier releases wrote SHA-256 instead (version 2), or that of weights alone (version 1). A
directory without a manifest was written by another program, or by `save_pretrained`.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from .binding import compare, numbers_in
from .digests import changed, check_entries, file_entry
from .inside import check_inside, check_regular, in_hub_cache
from .json import json_text, read_json
from .names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
)
from .schemas import Manifest, read_as

MANIFEST_VERSION = 3
SKIP_VARIABLE = "QALORA_NO_HASH_CHECK"
_CONFIGS = (CONFIG_FILE, ADAPTER_CONFIG_FILE)
_WEIGHTS = ".safetensors"
_AGAIN = "Write or copy it again."
_ACCEPT = (
    "Copy it again, or, if you changed it yourself, accept it with "
    "`qalora inspect {directory} --accept-edits`."
)
_log = logging.getLogger(__name__)
_skipped = 0

_beside: ContextVar[Mapping[Path, Future[Any]]] = ContextVar(
    "checks beside the work", default=MappingProxyType({})
)


@contextmanager
def unchecked_hashes() -> Iterator[None]:
    """Leave hashes out while this is open, in all threads; sizes and configs are still compared.

    For checkpoints so large that reading them once more costs too much. The environment variable
    QALORA_NO_HASH_CHECK=1 does the same for a whole process. Each directory is named in a warning.
    """
    global _skipped
    _skipped += 1
    try:
        yield
    finally:
        _skipped -= 1


def _skips() -> bool:
    return _skipped > 0 or os.environ.get(SKIP_VARIABLE, "0") not in ("", "0")


def write_manifest(directory: Path, names: Iterable[str] | None = None) -> None:
    """Write the manifest of a directory that is complete.

    Args:
        directory: where the files lie.
        names: files to enter, relative to the directory, beside those that a manifest has already;
            by default all that are there, and those alone.
    """
    from .atomic import replace_text  # whose directories get a manifest

    path = directory / MANIFEST_FILE
    old: dict[str, Any] = {"files": {}, "bound": {}}
    if names is not None and path.exists():
        with suppress(CheckpointError):  # a damaged one is replaced
            old |= read_as(path, Manifest)
    found = _covered(directory) if names is None else list(names)
    files, bound = dict(old["files"]), dict(old["bound"])
    for name in sorted(found):
        file = directory / name
        if name in _CONFIGS:
            bound[name] = numbers_in(read_json(file), name)
        else:
            files[name] = file_entry(file)
    value = {"version": MANIFEST_VERSION, "bound": bound, "files": dict(sorted(files.items()))}
    replace_text(path, json_text(value, sort_keys=False))


def _covered(directory: Path) -> list[str]:
    """Return the files of a directory that its manifest covers, the configs among them."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return [
        path.as_posix()
        for path in paths
        if not any(part.startswith(".") for part in path.parts)
        and path.name not in (CARD_FILE, MANIFEST_FILE)
    ]


def check_manifest(directory: str | Path) -> bool:
    """Compare a directory with its manifest: the one function that every door calls.

    Each file is read once in a process, as long as it does not change. In the Hub's cache files
    other than weights may be missing: they may not have been downloaded.

    Returns:
        True if all hashes hold; False if there is no manifest, or hashes are not to be checked.

    Raises:
        CheckpointError: the manifest is damaged, a file is missing or differs, weights are not
            listed, or a config contradicts what was bound.
    """
    directory = Path(directory)
    if directory in _beside.get():  # whose result is waited for before anything is named
        return not _skips() and (directory / MANIFEST_FILE).exists()
    return _check(directory)


def _check(directory: Path) -> bool:
    path = directory / MANIFEST_FILE
    if not path.exists():
        return False
    manifest = _read(path)
    for name, stated in manifest.get("bound", {}).items():
        if name not in _CONFIGS:
            raise CheckpointError(f"{path}: bound: {name!a} is no config. {_AGAIN}")
        found = numbers_in(read_json(directory / name), name)
        compare(stated, found, directory / name, "its tensors")
    files = manifest["files"]
    _check_weights_listed(directory, files)
    present = [name for name in files if _check_size(directory, name, files[name]["size"])]
    if _skips():
        asked = "this run was asked (--no-hash-check)" if _skipped else f"{SKIP_VARIABLE} says"
        _log.warning("%s: hashes are not checked, as %s", directory, asked)
        return False
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        # the largest first: the others fit beside it
        present.sort(key=lambda name: -files[name]["size"])
        differences = pool.map(
            lambda name: changed(directory / name, files[name], MANIFEST_FILE), present
        )
        for name, difference in zip(present, differences, strict=True):
            if difference:
                raise _changed(directory, name, difference)
    return True


def check_index(directory: Path) -> None:
    """Compare the index of sharded weights with its hash: transformers reads it by itself.

    A directory without an index, or without a manifest, is let through.

    Raises:
        CheckpointError: the manifest is damaged, or the index differs.
    """
    path = directory / MANIFEST_FILE
    if _skips() or not (path.exists() and (directory / INDEX_FILE).exists()):
        return
    entry = _read(path)["files"].get(INDEX_FILE)
    if entry is None or not _check_size(directory, INDEX_FILE, entry["size"]):
        return
    if difference := changed(directory / INDEX_FILE, entry, MANIFEST_FILE):
        raise _changed(directory, INDEX_FILE, difference)


def _changed(directory: Path, name: str, difference: str) -> CheckpointError:
    advice = _AGAIN if name.endswith(_WEIGHTS) else _ACCEPT.format(directory=directory)
    return CheckpointError(
        f"{directory / name}: {difference}. It changed after it was written. {advice}"
    )


def _read(path: Path) -> dict[str, Any]:
    manifest = read_as(path, Manifest)
    if manifest["version"] > MANIFEST_VERSION:
        raise CheckpointError(
            f"{path}: version {manifest['version']} is newer than the one that this release reads "
            f"({MANIFEST_VERSION}). Update qalora-plugin."
        )
    check_entries(manifest["files"], f"{path}: files")
    return manifest


def start_check(directory: Path) -> Future[bool]:
    """Run `check_manifest` in a thread; hashing leaves other threads free to read."""
    return _in_thread(check_manifest, directory)


def _in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    with_thread = ThreadPoolExecutor(1)
    future = with_thread.submit(function, *arguments)
    with_thread.shutdown(wait=False)
    return future


@contextmanager
def checked_beside(directory: Path, check: Callable[[Path], Any] | None = None) -> Iterator[None]:
    """Check what lies in a directory in a thread while this is open.

    No output of `atomic` gets its name before `await_checks` has seen the check pass.

    Args:
        directory: that is read meanwhile; of a file, which has no manifest, its path.
        check: called with it; by default `check_manifest`, which then does not wait for it.

    Raises:
        CheckpointError: the check failed, which also explains any error inside.
    """
    future = _in_thread(_check if check is None else check, directory)
    token = _beside.set({**_beside.get(), directory: future})
    try:
        yield
    finally:
        _beside.reset(token)
        future.result()


def await_checks() -> None:
    """Wait for the checks beside the work, before a result of it gets its name.

    Raises:
        CheckpointError: one of them failed.
    """
    for future in _beside.get().values():
        future.result()


def _check_weights_listed(directory: Path, files: dict[str, Any]) -> None:
    """Refuse weights that the manifest leaves out: it would say nothing about them."""
    weights = {path.name for path in directory.glob(f"*{_WEIGHTS}")}
    if not (directory / CONFIG_FILE).exists():  # of an adapter, beside whatever a trainer saves
        weights &= {ADAPTER_WEIGHTS_FILE}
    unlisted = sorted(weights - files.keys())
    if unlisted:
        raise CheckpointError(
            f"{directory / unlisted[0]}: is not in {MANIFEST_FILE}, which lists {len(files)} "
            "files. It was added or renamed afterwards: remove it, or write the directory again."
        )


def _check_size(directory: Path, name: str, stated: int) -> bool:
    """Compare a file's size, and return whether the file is there."""
    path, file = directory / MANIFEST_FILE, directory / name
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\0" in name:
        raise CheckpointError(f"{path}: entry {name!a} is not a file of this directory.")
    check_inside(file, directory)
    if not os.path.lexists(file):
        if in_hub_cache(directory) and not name.endswith(_WEIGHTS):
            return False
        raise CheckpointError(
            f"{file}: missing, but {MANIFEST_FILE} lists it. Download or copy it again."
        )
    size = check_regular(file, directory).st_size
    if size != stated:
        raise _changed(directory, name, f"{size} bytes, {MANIFEST_FILE} says {stated} bytes")
    return True


def accept_edits(directory: Path) -> list[str]:
    """Enter files into a directory's manifest as they are now; return those that differed.

    Weights and configs have to be as they were written: these are checked first. What is gone is
    taken out.

    Raises:
        CheckpointError: there is no manifest, or weights or a config differ from it.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise CheckpointError(f"{directory}: has no {MANIFEST_FILE}: there is nothing to accept.")
    manifest = _read(path)
    old = manifest["files"]
    weights = {name: entry for name, entry in old.items() if name.endswith(_WEIGHTS)}
    _check_weights_listed(directory, old)
    for name, entry in weights.items():
        _check_size(directory, name, entry["size"])
        if changed(directory / name, entry, MANIFEST_FILE):
            raise CheckpointError(f"{directory / name}: differs from {MANIFEST_FILE}. {_AGAIN}")
    for name, stated in manifest.get("bound", {}).items():
        found = numbers_in(read_json(directory / name), name)
        compare(stated, found, directory / name, "its tensors")
    write_manifest(directory)
    new = read_as(path, Manifest)["files"]
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
