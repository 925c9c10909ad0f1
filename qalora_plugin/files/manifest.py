"""The hashes of a checkpoint's weight files: nearly any flipped bit in them would still load."""

import hashlib
from pathlib import Path

from ..errors import CheckpointError
from .json import read_json, write_json
from .names import MANIFEST_FILE

MANIFEST_VERSION = 1


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex digits."""
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
    """Compare the weight files with the directory's manifest; return whether there is one.

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
        found, stated = f"{file.stat().st_size} bytes", f"{entry.get('size')} bytes"
        if found == stated:
            found, stated = f"SHA-256 {file_sha256(file)}", f"SHA-256 {entry.get('sha256')}"
        if found != stated:
            raise CheckpointError(
                f"{file}: {found}, {MANIFEST_FILE} says {stated}. "
                "It changed after it was written: write or copy it again."
            )
    return True
