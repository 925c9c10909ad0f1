"""Load a quantized checkpoint for ZeRO-3 or FSDP: one layer at a time, each rank keeps its part.

transformers loads a quantized model whole on every rank before anything can shard it. So it gets
placeholders for the quantized layers, and these are filled here when the rest is loaded.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from qalora_kernels import QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.fingerprint import fingerprint
from ..distributed.sharding import fsdp_enabled, loads_from_rank_0, partition, zero3_enabled
from ..layers.absent import AbsentWeight
from ..layers.linear import QuantLinear
from ..layers.sharded import ShardedQuantLinear, pack_grid


class PendingLayer(nn.Module):
    """Stands for a quantized layer until it is loaded; transformers fills its bias."""

    def __init__(self, spec: QuantSpec, bias: nn.Parameter | None) -> None:
        super().__init__()
        # some parents initialise their layers' weights
        self.weight = AbsentWeight((spec.out_features, spec.in_features), torch.float32, "meta")
        self.bias = bias
        self._is_hf_initialized = True


def loads_sharded() -> bool:
    """Whether a model that is loaded now will be trained by ZeRO-3 or FSDP."""
    return zero3_enabled() or fsdp_enabled()


def load_layers(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, placed: dict[str, str]
) -> None:
    """Put the quantized layers in the places of the `PendingLayer`s.

    Under ZeRO-3 each rank keeps its part of a layer before the next one is read. With FSDP's
    cpu_ram_efficient_loading rank 0 alone reads them: Accelerate sends the others their parts.

    Args:
        model: loaded but for these layers.
        checkpoint: what is loaded.
        placed: the checkpoint's name of every layer, by the model's name.

    Raises:
        CheckpointError: a layer holds numbers that no layer can have.
    """
    get = checkpoint.reader.get
    if checkpoint.config.base.get("fingerprint") is None:  # a stock GPTQ one
        marks = ((name, get(f"{layer}.qweight")) for name, layer in placed.items())
        checkpoint.config.base["fingerprint"] = fingerprint(marks)
    for name, layer in placed.items():
        pending = model.get_submodule(name)
        spec, desc_act = checkpoint.layers[layer], checkpoint.config.desc_act
        made = ShardedQuantLinear(spec, desc_act=desc_act, device="meta")
        if not loads_from_rank_0():
            tensors = checkpoint.layer(layer)
            made.qweight = _frozen(tensors.qweight)
            made.grid = _frozen(pack_grid(tensors.scales, tensors.offsets, spec))
            if tensors.g_idx is not None:
                made.g_idx = _frozen(tensors.g_idx)
        made.bias = pending.bias  # type: ignore[assignment]
        model.set_submodule(name, shard(made.train(pending.training)))
    finish_sharding(model)


def shard(layer: QuantLinear) -> QuantLinear:
    """A layer as this rank keeps it in the training that is set up: unchanged without sharding."""
    if not loads_sharded():
        return layer
    sharded = layer if isinstance(layer, ShardedQuantLinear) else ShardedQuantLinear.of(layer)
    if loads_from_rank_0():
        return sharded.to("meta")
    if zero3_enabled():
        bias, sharded.bias = sharded.bias, None  # may not be loaded yet
        partition(sharded)
        sharded.bias = bias
    return sharded


def finish_sharding(model: nn.Module) -> None:
    """Partition what is left under ZeRO-3: embeddings, norms, biases."""
    if zero3_enabled():
        partition(model)


def _frozen(tensor: "nn.Parameter | object") -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)  # type: ignore[arg-type]
