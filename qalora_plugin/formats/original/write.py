"""Find the file that a merged model's base was read from, check it, and have it patched."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...checkpoint.format import Format, format_named
from ...checkpoint.side_files import chat_templates
from ...checkpoint.source import SOURCE_KEY, check_source
from ...errors import CheckpointError, ConfigError
from ...files.hub import locate
from ...files.json import read_json
from ...files.manifest import checked_beside
from ...files.names import GENERATION_CONFIG_FILE
from ...files.writer import cores_left
from ..export import ExportResult, Progress, is_file_name


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    **given: str | Path,
) -> ExportResult:
    """Write the base's own file again with the merged scales and offsets; see `export_model`.

    `given` may have `original`: where the base's file lies by now.

    Raises:
        CheckpointError: the base came from no foreign format, from one that takes nothing back, or
            from a file that has changed; or the merged model is not that file's.
        ConfigError: `out` does not fit the format.
    """
    merged = open_quantized(source)
    record, format = _record(merged)
    if "files" not in record:
        raise CheckpointError(f"{merged.directory}: is the source itself; there is nothing to do.")
    path = Path(out).expanduser()
    if format.suffix and path.suffix != format.suffix:
        raise ConfigError(f"{path.name}: expected the name of a file that ends in {format.suffix}")
    if not format.suffix and is_file_name(path):
        raise ConfigError(
            f"{path.name}: expected the name of a directory, which the base is, found one that "
            f"ends in {path.suffix}. Choose another name."
        )
    original = _open(merged, record, given.get("original"))
    if original.format != format.name:
        raise CheckpointError(
            f"{original.directory}: expected the base in format {format.name!r}, found one in "
            f"format {original.format!r}. Name the right one with --original."
        )
    hashed = checked_beside(original.directory, lambda _: check_source(record, original))
    with hashed, cores_left():
        write_back = format.module("write_back").write_back
        result: ExportResult = write_back(original, merged, path, progress)
    return replace(result, exactness=result.exactness + _kept(original, merged.directory))


def _kept(original: QuantizedCheckpoint, merged: Path) -> str:
    """Say what of a trained tokenizer the source's files do not get; empty if nothing."""
    with TemporaryDirectory() as directory:
        source = Path(directory)
        original.write_side_files(source)
        kept = {"chat template": chat_templates(source), "end tokens": _ends(source)}
    trained = {"chat template": chat_templates(merged), "end tokens": _ends(merged)}
    changed = [what for what, found in trained.items() if found and found != kept[what]]
    if not changed:
        return ""
    which = " and ".join(changed)
    return f" Mind: {which} of the source are kept, and {merged} has others: give them at run time."


def _ends(directory: Path) -> set[int]:
    path = directory / GENERATION_CONFIG_FILE
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    return {found} if isinstance(found, int) else set(found or ())


def check(source: QuantizedCheckpoint) -> Format:
    """Return the format of a base's source, which takes back what is merged.

    Raises:
        CheckpointError: it came from no foreign format, or from one that takes nothing back.
    """
    return _record(source)[1]


def _record(checkpoint: QuantizedCheckpoint) -> tuple[dict[str, Any], Format]:
    record = checkpoint.config.base.get(SOURCE_KEY)
    if record is None:
        raise CheckpointError(
            f"{checkpoint.directory}: its base was read from no file in a foreign format (its "
            "config has no base.source), so there is none to write back to. Choose another format."
        )
    format = format_named(record["format"])
    if not format.can_write_back:
        note = f": {format.back_note}" if format.back_note else ""
        raise CheckpointError(
            f"{checkpoint.directory}: its base is in format {format.name!r}, which takes nothing "
            f"back{note}. Choose another format."
        )
    return record, format


def _open(
    merged: QuantizedCheckpoint, record: dict[str, Any], given: str | Path | None
) -> QuantizedCheckpoint:
    if given is not None:
        return open_quantized(given)
    path = Path(locate(record["path"], merged.directory))
    if path.exists():
        return open_quantized(path)
    if "repo" in record:
        name = "/".join(filter(None, (record["repo"], record.get("file"))))
        return open_quantized(name, record.get("revision"))
    raise CheckpointError(
        f"{record['path']}: the base of {merged.directory} was read from it, and it is not there. "
        "Name a copy of it with --original."
    )
