"""The file or directory in a foreign format that a base was read from, to be patched again.

`quantization_config.base.source` of a base that was read from a foreign format, and of what is
merged from it:

    format        name of the format
    path          where it lies on this machine
    repo, revision, file  where it lies on the Hub, if it came from there; no file: all of it
    frozen        by mode of `adapt`, the layers that cannot take its result back; "*" for all
    files         {name: {size, sha256}} of its weight files, from the import or the merge on
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files.manifest import file_sha256

if TYPE_CHECKING:
    from .checkpoint import QuantizedCheckpoint

SOURCE_KEY = "source"


def describe_location(path: Path) -> dict[str, Any]:
    """Return `path`, and of what lies in the Hub's cache `repo`, `revision` and `file`."""
    path = path.expanduser().absolute()
    found: dict[str, Any] = {"path": str(path)}
    parts = path.parts
    if "snapshots" in parts[2:-1]:
        at = len(parts) - 1 - parts[::-1].index("snapshots")
        if parts[at - 1].startswith("models--"):
            repo = parts[at - 1].removeprefix("models--").replace("--", "/")
            found |= {"repo": repo, "revision": parts[at + 1], "file": "/".join(parts[at + 2 :])}
    return found


def sealed_base(checkpoint: "QuantizedCheckpoint") -> dict[str, Any]:
    """Return `quantization_config.base` with the hashes of the source's files."""
    base = dict(checkpoint.config.base)
    source = base.get(SOURCE_KEY)
    if source is not None and "files" not in source:
        files = {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in checkpoint.reader.files
        }
        base[SOURCE_KEY] = {**source, "files": files}
    return base


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json as it may be published: of the source's path the last part alone."""
    made = copy.deepcopy(config)
    base = (made.get("quantization_config") or {}).get("base") or {}
    source = base.get(SOURCE_KEY)
    if source is not None and "path" in source:
        source["path"] = Path(source["path"]).name
    return made


def check_source(record: dict[str, Any], checkpoint: "QuantizedCheckpoint") -> None:
    """Check that a source is what it was when it was read, by its files' hashes.

    Raises:
        CheckpointError: a file is missing, surplus, or has changed.
    """
    known = record.get("files") or {}
    found = {path.name: path for path in checkpoint.reader.files}
    if known.keys() != found.keys():
        raise CheckpointError(
            f"{checkpoint.directory}: expected the weight files {sorted(known)}, found "
            f"{sorted(found)}. Name the source that was trained on with --original."
        )
    for name, path in found.items():
        same = path.stat().st_size == known[name]["size"]
        if not same or file_sha256(path) != known[name]["sha256"]:
            raise CheckpointError(
                f"{path}: has changed since the base was read from it (expected SHA-256 "
                f"{known[name]['sha256']}). Restore the file, or name a copy of the original one "
                "with --original."
            )
