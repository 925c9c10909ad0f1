"""What a config says about numbers, bound to the tensors that it belongs to.

Most mistakes in config.json load: another group size with the same number of groups, another
rope_theta, a layer fewer. So a writer puts all of the config that can change a number into the
metadata of each safetensors file, and into the manifest; a reader compares. Files that were written
before, or by other programs, are bound to nothing.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json import parse_json
from .names import ADAPTER_CONFIG_FILE

METADATA_KEY = "qalora_config"
_SHOWN = 3  # keys in a message
_LONGEST = 60  # characters of a value there

# of config.json, at any depth: what a program notes, and what a user may set at will
_HARMLESS = {"_name_or_path", "license", "transformers_version", "use_cache"}
# of quantization_config: where integers came from, in words, and in the end their fingerprint
_PROVENANCE, _FINGERPRINT = "base", "fingerprint"
# of adapter_config.json: where the base is, and what matters in training alone
_HARMLESS_ADAPTER = {
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
    "seed",
}
# objects in which the last, or the first, entry that matches counts
_ORDERED = ("dynamic",)


def numbers_in(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the part of a config that can change numbers.

    Args:
        config: the content of the file.
        name: of the file, config.json or adapter_config.json.
    """
    if name == ADAPTER_CONFIG_FILE:
        return {key: value for key, value in config.items() if key not in _HARMLESS_ADAPTER}
    kept = {key: value for key, value in config.items() if key not in _HARMLESS}
    for key, value in kept.items():
        if key == "quantization_config" and isinstance(value, dict):
            kept[key] = _without_provenance(value)
        elif key.endswith("_config") and isinstance(value, dict):
            kept[key] = numbers_in(value, name)
    return kept


def _without_provenance(quantization: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in quantization.items() if key != _PROVENANCE}
    base = quantization.get(_PROVENANCE)
    if isinstance(base, dict) and _FINGERPRINT in base:
        kept[_PROVENANCE] = {_FINGERPRINT: base[_FINGERPRINT]}
    return kept


def _known_before(numbers: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is known only when all tensors are written: the fingerprint."""
    quantization = numbers.get("quantization_config")
    if not isinstance(quantization, dict):
        return numbers
    kept = {key: value for key, value in quantization.items() if key != _PROVENANCE}
    return numbers | {"quantization_config": kept}


def bound_metadata(config: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the metadata of a safetensors file that bind this config to its tensors."""
    # sorted, as the file itself is when it is written
    numbers = _known_before(numbers_in(config, name))
    text = json.dumps(numbers, separators=(",", ":"), sort_keys=True)
    return {METADATA_KEY: text}


def check_bound(metadata: Mapping[str, str], config: Mapping[str, Any], path: Path) -> bool:
    """Compare a config with the one that a safetensors file's metadata are bound to.

    Args:
        metadata: of the file.
        config: the content of `path`.
        path: the config's file.

    Returns:
        False where the metadata bind nothing.

    Raises:
        CheckpointError: names the keys that differ.
    """
    if METADATA_KEY not in metadata:
        return False
    try:
        stated = parse_json(metadata[METADATA_KEY])
    except ValueError as error:
        raise CheckpointError(
            f"{path.parent}: the metadata of its tensors are damaged: {METADATA_KEY} is no JSON "
            f"({error}). Write or copy it again."
        ) from error
    compare(stated, _known_before(numbers_in(config, path.name)), path, "the tensors")
    return True


def compare(stated: Any, found: Mapping[str, Any], path: Path, holder: str) -> None:
    """Compare what was bound with a config as it is now.

    Args:
        stated: `numbers_in` the config that was written.
        found: `numbers_in` the config as it is.
        path: the config's file.
        holder: what `stated` was found in, for the message.

    Raises:
        CheckpointError: names the keys that differ.
    """
    different = list(_differences("", stated, found))
    if not different:
        return
    more = f" ({len(different)} keys differ)" if len(different) > _SHOWN else ""
    shown = "; ".join(
        f"{key} is {_short(new)}, {_short(old)} when {holder} were written"
        for key, old, new in different[:_SHOWN]
    )
    raise CheckpointError(
        f"{path}: {shown}{more}. It was changed afterwards: restore the original file, or write "
        "the directory again."
    )


class _Absent:
    def __repr__(self) -> str:
        return "not there"


_ABSENT = _Absent()


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, value then, value now) of every difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            inner = f"{key}.{name}" if key else name
            yield from _differences(inner, old.get(name, _ABSENT), new.get(name, _ABSENT))
        if key.rpartition(".")[2] in _ORDERED and old == new and list(old) != list(new):
            yield f"the order of {key}", list(old), list(new)
    elif not _same(old, new):
        yield key, old, new


def _same(old: Any, new: Any) -> bool:
    """Say whether two values mean the same: 1 is 1.0, but not true; NaN is itself."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, bool) or isinstance(new, bool):
        return old is new
    return bool(old == new or (old != old and new != new))


def _short(value: Any) -> str:
    text = f"{value!a}" if not isinstance(value, _Absent) else repr(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
