"""One layer's tensors, as a checkpoint of ours stores them: checked, and made one `PackedWeight`.

vLLM hands over tensors without their files, so messages name the tensor alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from qalora_kernels import PackedWeight, load_offsets
from qalora_kernels.stored import GUARD, QUANT_METHOD, StoredConfig, layer_plan

DAMAGED = "The checkpoint is damaged: write or copy it again."
_CONTRADICTED = "config.json contradicts the tensors: restore the original one."


def read_config(quantization_config: Mapping[str, Any]) -> StoredConfig:
    """Return what config.json's `quantization_config` says.

    Raises:
        ValueError: a key that this release does not know, or a newer `format_version`.
    """
    values = {key: value for key, value in quantization_config.items() if key != "quant_method"}
    version = StoredConfig(format_version=values.get("format_version", 0))
    if (problem := version.version_problem()) is not None:
        raise ValueError(problem)
    try:
        config = StoredConfig(**values)
    except TypeError as error:
        raise ValueError(f"quantization_config of {QUANT_METHOD!r}: {error}") from error
    config.dynamic = dict(config.dynamic or {})
    return config


def needed(config: StoredConfig) -> set[str]:
    """Return the last parts of the names of the tensors that every quantized layer has."""
    return {"qweight", "scales", "offsets", GUARD} | ({"g_idx"} if config.desc_act else set())


def check_names(tensors: Iterable[str], config: StoredConfig) -> None:
    """Check by the names of a checkpoint's tensors that each quantized layer has its own, no other.

    Raises:
        ValueError: one is missing or surplus, which the message names, or no layer is quantized.
    """
    layers: dict[str, set[str]] = {}
    for tensor in tensors:
        layer, _, part = tensor.rpartition(".")
        layers.setdefault(layer, set()).add(part)
    quantized = {
        layer: parts
        for layer, parts in layers.items()
        if "qweight" in parts or {"scales", "offsets"} <= parts
    }
    if not quantized:
        raise ValueError(
            f"config.json says {QUANT_METHOD!r}, but no tensor is a qweight. {DAMAGED}"
        )
    for layer, parts in sorted(quantized.items()):
        if missing := sorted(needed(config) - parts):
            raise ValueError(f"{layer}.{missing[0]} is missing. {DAMAGED}")
        if surplus := sorted(parts - needed(config) - {"bias"}):
            raise ValueError(
                f"{layer}.{surplus[0]} belongs to no layer that config.json describes "
                f"(desc_act is {config.desc_act}). {_CONTRADICTED}"
            )


def read_layer(
    name: str, tensors: Mapping[str, torch.Tensor], config: StoredConfig, in_features: int
) -> PackedWeight:
    """Return the layer `name`.

    Args:
        name: of the layer, as config.json names it.
        tensors: by the last parts of their names; those that `needed` lists.
        config: of the checkpoint.
        in_features: K, as the model's config says.

    Raises:
        ValueError: a tensor is missing, has another dtype or shape than `config` says, or holds
            values that no layer has. The message names it.
    """
    for part in sorted(needed(config)):
        if part not in tensors:
            raise ValueError(f"{name}.{part} is missing. {DAMAGED}")
    _check_guard(f"{name}.{GUARD}", tensors[GUARD], in_features)
    qweight = tensors["qweight"]
    if qweight.ndim != 2:
        found = f"found shape {list(qweight.shape)}"
        raise ValueError(f"{name}.qweight: expected [rows, out_features], {found}. {DAMAGED}")
    spec = config.spec_for(name, in_features, qweight.shape[1])
    for full, (dtype, shape) in layer_plan(name, spec, config.desc_act).items():
        tensor = tensors[full.rpartition(".")[2]]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(
                f"{full}: expected {dtype} {list(shape)} for bits={spec.bits}, group_size="
                f"{spec.group_size}, in_features={in_features}, found {tensor.dtype} "
                f"{list(tensor.shape)}. {_CONTRADICTED}"
            )
    for part in ("scales", "offsets"):
        wrong = int((~tensors[part].isfinite()).sum())
        if wrong:
            found = f"found {wrong} of {tensors[part].numel()} that are not"
            raise ValueError(f"{name}.{part}: expected finite numbers, {found}. {DAMAGED}")
    g_idx = tensors.get("g_idx") if config.desc_act else None
    if g_idx is not None:
        low, high = (int(value) for value in torch.aminmax(g_idx))
        if low < 0 or high >= spec.num_groups:
            raise ValueError(
                f"{name}.g_idx: expected group numbers from 0 to {spec.num_groups - 1}, found "
                f"{low} to {high}. {DAMAGED}"
            )
    offsets = load_offsets(tensors["offsets"], tensors["scales"], spec)
    return PackedWeight(qweight, tensors["scales"], offsets, g_idx, spec)


def _check_guard(name: str, guard: torch.Tensor, in_features: int) -> None:
    if guard.shape != (1,):
        raise ValueError(
            f"{name}: expected the guard of a quantized layer, of shape [1], found shape "
            f"{list(guard.shape)}. A layer that is not quantized has to be listed in "
            "config.json's modules_to_not_convert."
        )
    if guard.item() != in_features:
        raise ValueError(
            f"{name}: expected {in_features}, the layer's in_features, found {guard.item():g}. "
            "config.json belongs to another model: restore the original one."
        )
