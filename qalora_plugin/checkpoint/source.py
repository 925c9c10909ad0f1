"""The file or directory in a foreign format that a base was read from, to be patched again.

`quantization_config.base.source` of a base that was read from a foreign format, and of what is
merged from it:

    format        name of the format
    path          where it lies on this machine
    repo, revision, file  where it lies on the Hub, if it came from there; no file: all of it
    frozen        by mode of `adapt`, the layers that cannot take its result back; "*" for all
    files         {name: {size, xxh3_128}} of its files, from the import or the merge on; earlier
                  releases wrote `sha256`, or that of the weights alone
"""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files.digests import changed, check_entries, file_entry
from ..files.hub import public_name

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


def hash_files(checkpoint: "QuantizedCheckpoint") -> dict[str, dict[str, Any]]:
    """Return size and hash of every file that writing back copies; each is read once."""
    return {name: file_entry(path) for name, path in source_files(checkpoint).items()}


def source_files(checkpoint: "QuantizedCheckpoint") -> dict[str, Path]:
    """Return the files of a source by name: one, or all of a directory that are not hidden."""
    directory = checkpoint.directory
    if directory.is_file():
        return {directory.name: directory}
    found = {path.relative_to(directory): path for path in sorted(directory.rglob("*"))}
    return {
        name.as_posix(): path
        for name, path in found.items()
        if path.is_file() and not any(part.startswith(".") for part in name.parts)
    }


def sealed_base(checkpoint: "QuantizedCheckpoint") -> dict[str, Any]:
    """Return `quantization_config.base` with the hashes of the source's files."""
    base = dict(checkpoint.config.base)
    source = base.get(SOURCE_KEY)
    if source is not None and "files" not in source:
        base[SOURCE_KEY] = {**source, "files": hash_files(checkpoint)}
    return base


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json, or adapter_config.json, as it may be published.

    Of the path of a source, or of an adapter's base, that is the last part alone.
    """
    made = copy.deepcopy(config)
    if made.get("base_model_name_or_path"):
        made["base_model_name_or_path"] = public_name(made["base_model_name_or_path"])
    base = (made.get("quantization_config") or {}).get("base") or {}
    source = base.get(SOURCE_KEY)
    if source is not None and "path" in source:
        source["path"] = Path(source["path"]).name
    return made


def check_source(record: dict[str, Any], checkpoint: "QuantizedCheckpoint") -> None:
    """Check that a source is what it was when it was read, by its files' hashes.

    Records of earlier releases know the weight files alone. What was added since is let through.

    Raises:
        CheckpointError: a file is missing or has changed, or a weight file is surplus.
    """
    known, found = record.get("files") or {}, source_files(checkpoint)
    check_entries(known, "quantization_config.base.source.files")
    weights = {path.name for path in checkpoint.reader.files}
    if not weights <= known.keys() or not known.keys() <= found.keys():
        listed = sorted(known.keys() - found.keys()) or sorted(known)
        raise CheckpointError(
            f"{checkpoint.directory}: expected the files {listed}, found "
            f"{sorted(weights if known.keys() <= found.keys() else found)}. Name the source that "
            "was trained on with --original."
        )
    for name, stated in known.items():
        path, difference = found[name], ""
        if (size := path.stat().st_size) != stated["size"]:
            difference = f"{size} bytes, the base says {stated['size']}"
        if difference := difference or changed(path, stated, "the base"):
            raise CheckpointError(
                f"{path}: has changed since the base was read from it ({difference}). Restore the "
                "file, or name a copy of the original one with --original."
            )
