"""qalora_export.json: what an export holds, kept beside it for verifying and for its model card."""

import os
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..files.atomic import atomic_file
from ..files.hub import resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import ADAPTER_CONFIG_FILE, RECORD_FILE
from .walk import ExportResult

GGUF_KEY = "qalora.source"  # a GGUF file has no files beside it
_ADAPTER_FACTS = ("r", "lora_alpha", "layers")


def public_name(name_or_path: Any) -> str:
    """A Hub id as it is; of a path only its last part, which tells nothing about the machine.

    A name of two parts is a path if there is such a directory now, as when a model is loaded.
    """
    text = str(name_or_path or "")
    if not text:
        return text
    is_path = os.path.isabs(text) or text.count("/") > 1 or text[0] in ".~" or os.path.isdir(text)
    return os.path.basename(os.path.abspath(text)) if is_path else text


def describe_source(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """What the card of an export says about the model it was made from."""
    config, merged = checkpoint.config, checkpoint.config.merged or {}
    adapters = merged.get("adapters", [merged])  # several, if they were merged in one step
    adapts = sorted({adapter["adapt"] for adapter in adapters if "adapt" in adapter})
    return {
        "base": public_name(config.base.get("name_or_path")),
        "licence": licence_of(str(config.base.get("name_or_path") or "")),
        "bits": config.bits,
        "group_size": config.group_size,
        "method": config.method,
        "fine_tuned": config.merged is not None,
        **({"adapt": ", ".join(adapts)} if adapts else {}),
        **{key: merged[key] for key in _ADAPTER_FACTS if key in merged},
    }


def licence_of(base: str) -> str | None:
    """The licence that a base on this disk names in its card, or in its config.json."""
    from huggingface_hub import ModelCard

    directory = Path(base)
    if (directory / "README.md").is_file():
        try:
            licence = ModelCard.load(directory / "README.md").data.license
        except (OSError, ValueError):
            licence = None
        if licence:
            return str(licence)
    if (directory / "config.json").is_file():
        licence = read_json(directory / "config.json").get("license")
        return str(licence) if licence else None
    return None


def write_record(result: ExportResult, source: str | Path) -> None:
    """Write the record into an exported directory.

    Args:
        result: the export.
        source: what was exported; for lora the adapter.
    """
    if result.format == "lora":
        config = read_json(resolve_model_dir(source) / ADAPTER_CONFIG_FILE)
        # the adapter's own may be relative to where it was trained
        base = str(read_json(result.out / ADAPTER_CONFIG_FILE)["base_model_name_or_path"])
        keys = ("bits", "group_size", "r", "lora_alpha")
        facts = {"base": public_name(base), "licence": licence_of(base), "fine_tuned": True}
        facts |= {key: config[key] for key in keys if config.get(key) is not None}
    else:
        facts = describe_source(open_quantized(source))
    record = {**result.as_dict(), "source": facts, "qalora_version": __version__}
    del record["out"]
    with atomic_file(result.out / RECORD_FILE) as partial:
        write_json(partial, record)


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of an exported directory, or None where it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / RECORD_FILE
    return read_json(path) if path.exists() else None
