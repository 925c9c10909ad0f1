"""Hashes of a checkpoint's weight files: nearly any flipped bit in them would still load."""

import hashlib
from pathlib import Path

from ..errors import CheckpointError
from ..files.json import write_json
from .json import read_json
from .names import MANIFEST_FILE

MANIFEST_VERSION = 1


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, hashes: dict[str, str]) -> None:
    """Write qalora_manifest.json: size in bytes and SHA-256 of every weight file.

    Args:
        directory: where the files lie.
        hashes: SHA-256 by file name.
    """
    files = {
        name: {"size": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in sorted(hashes.items())
    }
    value = {"version": MANIFEST_VERSION, "files": files}
    write_json(directory / MANIFEST_FILE, value, sort_keys=False)


def check_manifest(directory: str | Path) -> bool:
    """Compare the weight files with the directory's manifest.

    Args:
        directory: a checkpoint directory.

    Returns:
        True if every file is as it was written, False if the directory has no manifest.

    Raises:
        CheckpointError: the manifest is damaged, or a file is missing or differs.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not path.exists():
        return False
    files = read_json(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: expected an object `files`, found {files!r}.")
    for name, entry in files.items():
        if Path(name).name != name or not isinstance(entry, dict):
            raise CheckpointError(f"{path}: entry {name!r} is not a file of this directory.")
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but {MANIFEST_FILE} lists it.")
        size, digest = entry.get("size"), entry.get("sha256")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, {MANIFEST_FILE} says {size}. "
                "It changed after it was written: write or copy it again."
            )
        if (found := file_sha256(file)) != digest:
            raise CheckpointError(
                f"{file}: SHA-256 {found}, {MANIFEST_FILE} says {digest}. "
                "It changed after it was written: write or copy it again."
            )
    return True
