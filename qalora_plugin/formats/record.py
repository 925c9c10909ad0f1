"""What an export says of itself, for verifying it and for its model card.

A directory has qalora_export.json, a file in a format that is one file holds the same: `format`,
`source` (facts about the model it was made from), `exactness` and, where it was measured,
`measured` (see `formats.requantize.Loss`).
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.format import format_named
from ..checkpoint.kind import find_kind
from ..errors import CheckpointError
from ..files.front_matter import read_front_matter
from ..files.hub import public_name, resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import ADAPTER_CONFIG_FILE, CARD_FILE, CONFIG_FILE, RECORD_FILE
from ..files.schemas import Record, read_as

_ADAPTER_FACTS = ("r", "lora_alpha", "layers")
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+ -]{0,63}")  # the Hub's names of licences, and longer ones


def describe_source(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """Return what the card of an export says about the model it was made from."""
    config, merged = checkpoint.config, checkpoint.config.merged or {}
    adapters = merged.get("adapters", [merged])  # several, if they were merged in one step
    adapts = sorted({adapter["adapt"] for adapter in adapters if "adapt" in adapter})
    return {
        "base": public_name(config.base.get("name_or_path")),
        "licence": licence_of(str(config.base.get("name_or_path") or "")),
        "bits": config.bits,
        "group_size": config.group_size,
        "mixed": bool(config.dynamic),
        "method": config.method,
        "fine_tuned": config.merged is not None,
        **({"adapt": ", ".join(adapts)} if adapts else {}),
        **{key: merged[key] for key in _ADAPTER_FACTS if key in merged},
    }


def _describe_adapter(exported: Path, adapter: str | Path) -> dict[str, Any]:
    """Return the same of an adapter, and of the base that the export names."""
    config = read_json(resolve_model_dir(adapter) / ADAPTER_CONFIG_FILE)
    # the adapter's own may be relative to where it was trained
    base = str(read_json(exported / ADAPTER_CONFIG_FILE)["base_model_name_or_path"])
    keys = ("bits", "group_size", "r", "lora_alpha")
    facts = {key: config[key] for key in keys if config.get(key) is not None}
    return {"base": public_name(base), "licence": licence_of(base), "fine_tuned": True} | facts


def licence_of(base: str) -> str | None:
    """Return the licence that a base on this disk names in its card, or in its config.json.

    None of a name that is no whole path: a directory of that name here may be another model's.
    """
    if not Path(base).is_absolute():
        return None
    card, config = Path(base, CARD_FILE), Path(base, CONFIG_FILE)
    found = [read_front_matter(card).get("license")] if card.is_file() else []
    if config.is_file():
        with suppress(CheckpointError):
            found.append(read_json(config).get("license"))
    names = (str(name) for name in found if name)
    return next((name for name in names if _LICENCE.fullmatch(name)), None)


def write_record(exported: Path, result: dict[str, Any], source: str | Path) -> None:
    """Write the record into a directory: the fields of an `ExportResult`, and facts of `source`."""
    if format_named(result["format"]).of_adapter:
        facts = _describe_adapter(exported, source)
    else:
        facts = describe_source(open_quantized(source))
    write_json(exported / RECORD_FILE, {**result, "source": facts, "qalora_version": __version__})


def read_record(exported: Path) -> dict[str, Any] | None:
    """Return the record of an exported directory or file, None if it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if exported.is_dir():
        path = exported / RECORD_FILE
        if not path.exists():
            return None
        record = read_as(path, Record)
        missing = {"format", "source", "exactness"} - record.keys()
        if missing:
            raise CheckpointError(f"{path}: {min(missing)}: missing. Export again.")
        return record
    format = find_kind(exported).format
    return None if format is None else format.module("record").read_record(exported)
