"""Fit a quantized checkpoint's layers into a transformers model: before and after it is loaded."""

import re
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qalora_kernels import PackedWeight, QuantSpec, load_offsets

from ..architecture.names import LayerNames
from ..architecture.selection import linears_in_blocks, refuse_read_weights
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.layout import GUARD
from ..checkpoint.validate import check_values
from ..errors import CheckpointError
from ..layers.linear import QuantLinear
from .sharded_loading import PendingLayer


def place_layers(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, *, pending: bool = False
) -> dict[str, str]:
    """Replace the model's linear layers that the checkpoint holds quantized, on the meta device.

    Args:
        model: a `PreTrainedModel` on the meta device, without weights.
        checkpoint: what will be loaded into it.
        pending: put placeholders there, which `sharded_loading.load_layers` replaces later.

    Returns:
        The checkpoint's name of every replaced layer, by the model's name.

    Raises:
        CheckpointError: the checkpoint belongs to another architecture, or is incomplete.
    """
    names = LayerNames(model)
    placed: dict[str, str] = {}
    ignored: set[str] = set()
    missing: set[str] = set()
    for layer, spec in checkpoint.layers.items():
        target = names.parameter(f"{layer}.weight")
        ignored.add(names.unknown(f"{layer}.{GUARD}"))
        if not names.has(target):  # such as lm_head for a model class without a head
            continue
        name = target.removesuffix(".weight")
        linear = _checked_linear(checkpoint, layer, spec, model.get_submodule(name))
        bias, surplus_bias = _match_bias(checkpoint, layer, linear)
        if surplus_bias:
            ignored.add(names.unknown(f"{layer}.bias"))
        if pending:
            model.set_submodule(name, PendingLayer(spec, bias))
            ignored |= {names.unknown(f"{layer}.{part}") for part in checkpoint.packed_parts}
        else:
            quantized = QuantLinear(spec, desc_act=checkpoint.config.desc_act, device="meta")
            quantized.bias = bias
            model.set_submodule(name, quantized)
            if checkpoint.is_foreign:  # its own numbers are put in when all is loaded
                ignored |= {names.unknown(f"{layer}.{part}") for part in checkpoint.packed_parts}
                missing |= {f"{name}.{part}" for part in ("scales", "offsets")}
        placed[name] = layer
    refuse_read_weights(model, placed)
    if not placed:
        raise CheckpointError(
            f"{checkpoint.directory}: none of its {len(checkpoint.layers)} quantized layers "
            f"(such as {next(iter(checkpoint.layers))}) is a layer of {type(model).__name__}. "
            "Load it with the model class that it was saved from."
        )
    _check_dense_layers(model, checkpoint, names)
    # guards, all-zero biases of layers that have none in the model, what is put in afterwards
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *_exactly(ignored),
    }
    model._keys_to_ignore_on_load_missing = {
        *(model._keys_to_ignore_on_load_missing or ()),
        *_exactly(missing),
    }
    return placed


def _exactly(names: set[str]) -> list[str]:
    """Return a regular expression for these names and no others; none for none."""
    return ["^(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")$"] if names else []


def _checked_linear(
    checkpoint: QuantizedCheckpoint, layer: str, spec: QuantSpec, linear: nn.Module
) -> nn.Linear:
    found = type(linear).__name__
    if isinstance(linear, nn.Linear):
        if (linear.in_features, linear.out_features) == (spec.in_features, spec.out_features):
            return linear
        found = f"Linear({linear.in_features}, {linear.out_features})"
    raise CheckpointError(
        f"{checkpoint.reader.info(f'{layer}.qweight').file}: {layer} is a linear layer with "
        f"{spec.in_features} inputs and {spec.out_features} outputs; config.json's architecture "
        f"has {found} there. config.json belongs to another model."
    )


def _match_bias(
    checkpoint: QuantizedCheckpoint, layer: str, linear: nn.Linear
) -> tuple[nn.Parameter | None, bool]:
    """The layer's bias parameter, and whether the file has an all-zero one that nobody wants."""
    stored = f"{layer}.bias" in checkpoint.reader
    if stored == (linear.bias is not None):
        return linear.bias, False
    if not stored:
        raise CheckpointError(
            f"{checkpoint.directory}: {layer}.bias is missing. "
            "The checkpoint is incomplete: write or copy it again."
        )
    bias = checkpoint.reader.get(f"{layer}.bias")
    if not bias.any():  # GPTQ-for-LLaMa and early AutoGPTQ give every layer one
        return None, True
    empty = torch.empty(bias.shape, dtype=linear.weight.dtype, device="meta")
    return nn.Parameter(empty), False


def _check_dense_layers(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, names: LayerNames
) -> None:
    """A layer that is in the checkpoint neither quantized nor dense would be left random."""
    if names.are_converted:  # fused or split while loading: names do not tell
        return
    dense = {names.parameter(name) for name in checkpoint.reader.tensors}
    lost = [name for name in linears_in_blocks(model) if f"{name}.weight" not in dense]
    if lost:
        raise CheckpointError(
            f"{checkpoint.directory}: no tensors for layer {lost[0]} ({len(lost)} such). "
            "The checkpoint is incomplete, or config.json belongs to another model."
        )


def finish_layers(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, placed: dict[str, str]
) -> None:
    """Check what was loaded, compute offsets of stored minima, convert stock layers.

    Args:
        model: the model with its weights.
        checkpoint: what was loaded into it.
        placed: as `place_layers` returned it.

    Raises:
        CheckpointError: a tensor was not loaded, or holds numbers that no layer can have.
    """
    for name, layer in placed.items():
        module = cast(QuantLinear, model.get_submodule(name))
        if checkpoint.is_foreign:
            _put(module, checkpoint.layer(layer))
        for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
            # buffers that no tensor filled are left uninitialised without a word
            if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"{checkpoint.directory}: {layer}.{part} was not loaded. "
                    "Write or copy the checkpoint again, or update qalora-plugin."
                )
        if not checkpoint.is_foreign:
            module.offsets = load_offsets(module.offsets, module.scales, module.spec)
            where = f"{checkpoint.directory}: {layer}"
            check_values(where, module.spec, module.scales, module.offsets, module.g_idx)


def _put(module: QuantLinear, weight: PackedWeight) -> None:
    """Give a layer the numbers that were read from a foreign format, on the device it is on."""
    device, spec = module.qweight.device, module.spec
    module.scales = weight.scales.to(device, spec.scales_dtype)
    module.offsets = weight.offsets.to(device, spec.offsets_dtype)
    if weight.g_idx is not None:
        module.g_idx = weight.g_idx.to(device)
    for tensor in (module.scales, module.offsets, module.g_idx):
        if tensor is not None:
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
