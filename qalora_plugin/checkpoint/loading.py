"""Fit a quantized checkpoint's layers into a transformers model: before and after it is loaded."""

import re

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from qalora_kernels import QuantSpec, load_offsets

from ..errors import CheckpointError
from ..quant.absent import AbsentWeight
from ..quant.linear import QuantLinear
from . import stock_gptq
from .base import QuantizedCheckpoint
from .layout import GUARD, QUANTIZED_TENSORS
from .selection import linears_in_blocks, refuse_read_weights
from .sharded_loading import PendingLayer
from .validate import check_values


class StockGPTQLinear(nn.Module):
    """Receives a stock GPTQ layer's tensors as they are stored, until they are converted.

    Args:
        spec: the layer's grid.
        words: int32 words in a row of `qzeros`.
        scales_dtype: as stored.
        bias: the model's own bias parameter, or None.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    def __init__(
        self, spec: QuantSpec, words: int, scales_dtype: torch.dtype, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.spec = spec
        # some parents initialise their layers' weights
        self.weight = AbsentWeight((spec.out_features, spec.in_features), torch.float32, "meta")
        groups, n = spec.num_groups, spec.out_features
        for name, shape, dtype in (
            ("qweight", (spec.packed_rows, n), torch.int32),
            ("qzeros", (groups, words), torch.int32),
            ("scales", (groups, n), scales_dtype),
            ("g_idx", (spec.in_features,), torch.int32),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = bias


class LayerNames:
    """Translates names of a checkpoint's tensors into those of a model, as transformers does.

    Attributes:
        are_converted: whether transformers also fuses or splits tensors of this architecture.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix: str = model.base_model_prefix
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self.are_converted = len(self._renamings) < len(mapping)

    def parameter(self, name: str) -> str:
        """Name that the model gives to a tensor of the checkpoint."""
        if name in self._state:
            return name
        return rename_source_key(name, self._renamings, [], self._prefix, self._state)[0]

    def unknown(self, name: str) -> str:
        """Name under which transformers reports a tensor that the model does not have."""
        return rename_source_key(name, self._renamings, [])[0]

    def has(self, name: str) -> bool:
        """Whether the model has a parameter or buffer of this name."""
        return name in self._state


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
    ignored = set()
    for layer, spec in checkpoint.layers.items():
        target = names.parameter(f"{layer}.weight")
        if checkpoint.stock is None:
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
            parts = (*QUANTIZED_TENSORS, "qzeros")
            ignored |= {names.unknown(f"{layer}.{part}") for part in parts}
        else:
            model.set_submodule(name, _empty_layer(checkpoint, layer, spec, bias))
        placed[name] = layer
    refuse_read_weights(model, placed)
    if not placed:
        raise CheckpointError(
            f"{checkpoint.directory}: none of its {len(checkpoint.layers)} quantized layers "
            f"(such as {next(iter(checkpoint.layers))}) is a layer of {type(model).__name__}. "
            "Load it with the model class that it was saved from."
        )
    _check_dense_layers(model, checkpoint, names)
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    if ignored:  # guards, all-zero biases of stock layers that have none in the model, pending
        known.add("^(?:" + "|".join(re.escape(name) for name in sorted(ignored)) + ")$")
    model._keys_to_ignore_on_load_unexpected = known
    return placed


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


def _empty_layer(
    checkpoint: QuantizedCheckpoint, layer: str, spec: QuantSpec, bias: nn.Parameter | None
) -> nn.Module:
    if checkpoint.stock is not None:
        qzeros = checkpoint.reader.info(f"{layer}.qzeros")
        scales = checkpoint.reader.info(f"{layer}.scales")
        return StockGPTQLinear(spec, qzeros.shape[1], scales.dtype, bias)
    quantized = QuantLinear(spec, desc_act=checkpoint.config.desc_act, device="meta")
    quantized.bias = bias
    return quantized


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
        module = model.get_submodule(name)
        for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
            # buffers that no tensor filled are left uninitialised without a word
            if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    f"{checkpoint.directory}: {layer}.{part} was not loaded. "
                    "Write or copy the checkpoint again, or update qalora-plugin."
                )
        if isinstance(module, StockGPTQLinear):
            module = convert_stock_layer(module, checkpoint, layer)
            model.set_submodule(name, module)
        else:
            module.offsets = load_offsets(module.offsets, module.scales, module.spec)
        where = f"{checkpoint.directory}: {layer}"
        check_values(where, module.spec, module.scales, module.offsets, module.g_idx)


def convert_stock_layer(
    module: StockGPTQLinear, checkpoint: QuantizedCheckpoint, layer: str
) -> QuantLinear:
    """A loaded stock layer as ours, on the same device."""
    assert checkpoint.stock is not None
    where = f"{checkpoint.directory}: {layer}"
    scales, offsets = stock_gptq.scales_and_offsets(
        where, module.qzeros, module.scales, module.spec, checkpoint.stock
    )
    quantized = QuantLinear(module.spec, desc_act=checkpoint.config.desc_act, device="meta")
    quantized.qweight = nn.Parameter(module.qweight, requires_grad=False)
    quantized.scales, quantized.offsets = scales.to(module.spec.scales_dtype), offsets
    if quantized.g_idx is not None:
        quantized.g_idx = module.g_idx
    quantized.bias = module.bias
    return quantized.train(module.training)
