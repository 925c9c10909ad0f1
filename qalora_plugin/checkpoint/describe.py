"""Describe a directory, and check it: 16-bit model, quantized or merged model, adapter."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qalora_kernels.stored import GUARD

from ..errors import CheckpointError, QALoRAError
from ..files.manifest import check_manifest
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ..files.reader import CheckpointReader
from ..files.schemas import AdapterConfig, read_as
from .adapter_values import check_adapter_values
from .checkpoint import QuantizedCheckpoint, open_headers, open_quantized
from .fit import check_fit
from .format import ADAPT_MODES
from .kind import find_kind
from .layout import quantized_layers
from .source import SOURCE_KEY

_ADAPTER_KEYS = ("peft_type", "adapt", "r", "lora_alpha", "bits", "group_size", "fingerprint")
_CONFIG_KEYS = ("desc_act", "scales_dtype", "offsets_dtype", "offsets_at", "method")
_PARTS = {
    "qweight": "integers",
    "scales": "scales",
    "offsets": "offsets",
    "biases": "offsets",
    "qzeros": "zero_points",
    "weight_packed": "integers",
    "weight_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_g_idx": "g_idx",
    "g_idx": "g_idx",
    GUARD: "guards",
}


def describe(
    directory: str | Path,
    quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
    values: bool = False,
) -> dict[str, Any]:
    """Describe a directory and check it.

    Numbers, and whether they fit the architecture, are checked when a checkpoint of ours is
    written: so they are not read again where hashes show that its files are those that were
    written. Of a base in a foreign format headers and config are checked, and that no float is NaN
    or infinity; its layers are read where `values` asks for it, and always when it is loaded.

    Args:
        directory: a local directory.
        quick: check config and headers only, not the values and not the hashes.
        values: read the numbers in any case.
        progress: called with (layers checked, layers in all).

    Returns:
        JSON-ready: `kind`, then what there is to say about that kind; `valid` and `problem`; sizes
        in bytes.

    Raises:
        CheckpointError: it holds neither a model nor an adapter that can be read at all.
    """
    directory = Path(directory)
    kind = find_kind(directory)
    if kind.is_adapter:
        return _describe_adapter(directory, quick)
    opened = None if directory.is_dir() else open_headers(directory)
    reader = CheckpointReader(directory) if opened is None else opened.reader
    total = sum(info.nbytes for info in reader.tensors.values())
    found: dict[str, Any] = {
        "kind": "quantized model",
        "directory": str(directory),
        "architecture": ", ".join(reader.config.get("architectures") or ["unknown"]),
        "files": len(reader.files),
        "valid": True,
        "problem": None,
    }
    if kind.is_16_bit and not quantized_layers(reader.tensors):
        parameters = sum(math.prod(info.shape) for info in reader.tensors.values())
        sizes = {"parameters": parameters, "bytes": {"total": total}}
        return found | {"kind": "16-bit model"} | sizes
    found["bytes"] = {"total": total}
    try:
        checkpoint = opened or open_headers(directory)
        found.update(_describe_quantized(checkpoint, total))
        if not quick:
            if directory.is_dir():
                found["hashes_checked"] = check_manifest(directory)
            as_written = found.get("hashes_checked", False) and checkpoint.bound
            # a mixture's experts may have no place in transformers' model, which has to be built
            mixture = any(".experts." in name for name in checkpoint.layers)
            by_headers = as_written or (checkpoint.is_foreign and not mixture)
            found["values_read"] = values or not by_headers
            if found["values_read"]:
                _check_values(open_quantized(directory, check_hashes=False), progress)
            elif not as_written:
                _check_floats(checkpoint, progress)
                found["all_finite"] = True
    except CheckpointError as error:
        found["valid"], found["problem"] = False, str(error)
    return found


def _check_values(
    checkpoint: QuantizedCheckpoint, progress: Callable[[int, int], None] | None
) -> None:
    """Read every number, and compare the tensors with the architecture; a CheckpointError says."""
    check_fit(checkpoint)
    for name in checkpoint.dense_names:
        checkpoint.reader.check_finite(name)
    for done, name in enumerate(checkpoint.layers):
        checkpoint.layer(name)
        if progress is not None:
            progress(done + 1, len(checkpoint.layers))


def _check_floats(
    checkpoint: QuantizedCheckpoint, progress: Callable[[int, int], None] | None
) -> None:
    """Look for NaN and infinity in every float as it is stored, without torch."""
    for done, name in enumerate(checkpoint.reader.tensors):
        checkpoint.reader.check_finite(name)
        if progress is not None:
            progress(done + 1, len(checkpoint.reader.tensors))


def _describe_quantized(checkpoint: QuantizedCheckpoint, total: int) -> dict[str, Any]:
    config = checkpoint.config
    sizes: Counter[str] = Counter()
    specs = checkpoint.layers.values()
    weights = sum(spec.in_features * spec.out_features for spec in specs)
    for name in checkpoint.layers:
        for part, kind in (_PARTS | {checkpoint.integers: "integers"}).items():
            if f"{name}.{part}" in checkpoint.reader:
                sizes[kind] += checkpoint.reader.info(f"{name}.{part}").nbytes
    packed = sum(sizes.values())
    kind = "quantized base"
    if checkpoint.is_foreign:
        kind = f"{checkpoint.format} model"
    found = {
        "kind": "merged model" if config.merged else kind,
        "bits": _spread(spec.bits for spec in specs),
        "group_size": _spread(spec.group_size for spec in specs),
        **{key: getattr(config, key) for key in _CONFIG_KEYS},
        "layers": len(specs),
        "weights_quantized": weights,
        "bits_per_weight": round(8 * (packed - sizes["guards"]) / weights, 3),
        "bytes": {**sizes, "rest": total - packed, "total": total},
        **_describe_source(config.base, len(specs)),
        "merged": config.merged,
        "config_bound": checkpoint.bound,
    }
    return found | checkpoint.facts


def _describe_source(base: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return `base`, and apart from it the foreign file and in how many layers it takes what."""
    source = base.get(SOURCE_KEY)
    if source is None:
        return {"base": base}
    rest = {key: value for key, value in base.items() if key != SOURCE_KEY}
    kept = {}
    for adapt in ADAPT_MODES:
        frozen = source["frozen"].get(adapt, [])
        kept[adapt] = 0 if frozen == ["*"] else layers - len(frozen)
    where = {key: value for key, value in source.items() if key not in ("frozen", "files")}
    return {"base": rest, "source": where, "layers_written_back": kept}


def _spread(values: Any) -> int | dict[str, int]:
    """Return the one value, or how many layers have which."""
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return {str(value): count for value, count in sorted(counts.items())}


def _describe_adapter(directory: Path, quick: bool) -> dict[str, Any]:
    config = read_as(directory / ADAPTER_CONFIG_FILE, AdapterConfig)
    weights = directory / ADAPTER_WEIGHTS_FILE
    if not weights.exists():
        raise CheckpointError(
            f"{directory}: {ADAPTER_CONFIG_FILE} but no {ADAPTER_WEIGHTS_FILE}. Adapters in pickle "
            "files are never read: save it again with safetensors."
        )
    reader = CheckpointReader(directory, only=ADAPTER_WEIGHTS_FILE)
    tensors = reader.tensors
    found: dict[str, Any] = {
        "kind": "adapter",
        "directory": str(directory),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        **{key: config[key] for key in _ADAPTER_KEYS if config.get(key) is not None},
        "tensors": len(tensors),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "bytes": {"total": sum(info.nbytes for info in tensors.values())},
        "valid": True,
        "problem": None,
    }
    if not quick:
        try:
            found["hashes_checked"] = check_manifest(directory)
            check_adapter_values(reader)
        except QALoRAError as error:
            found["valid"], found["problem"] = False, str(error)
    return found
