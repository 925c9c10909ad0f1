"""Load a quantized checkpoint for ZeRO-3 or FSDP: one layer at a time, each rank keeps its part.

transformers loads a quantized model whole on every rank before anything can shard it. So it gets
placeholders for the quantized layers, and these are filled here when the rest is loaded.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from qalora_kernels import QuantSpec

from ..architecture.experts import find_experts
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.fingerprint import fingerprint
from ..distributed.sharding import fsdp_enabled, loads_from_rank_0, partition, zero3_enabled
from ..layers.absent import AbsentWeight, mark_loaded
from ..layers.sharded import ShardedQuantLinear


class PendingLayer(nn.Module):
    """Stands for a quantized layer until it is loaded; transformers fills its bias."""

    def __init__(self, spec: QuantSpec, bias: nn.Parameter | None) -> None:
        super().__init__()
        # some parents initialise their layers' weights
        self.weight = AbsentWeight((spec.out_features, spec.in_features), torch.float32, "meta")
        self.bias = bias
        mark_loaded(self)


def loads_sharded() -> bool:
    """Say whether a model that is loaded now will be trained by ZeRO-3 or FSDP."""
    return zero3_enabled() or fsdp_enabled()


def load_layers(
    model: PreTrainedModel, checkpoint: QuantizedCheckpoint, placed: dict[str, str]
) -> None:
    """Put the quantized layers in the places of the `PendingLayer`s.

    Under ZeRO-3 each rank keeps its part of a layer before the next one is read. With FSDP's
    cpu_ram_efficient_loading rank 0 alone reads them: Accelerate sends the others their parts.

    `placed` is the checkpoint's name of every layer, by the model's name.

    Raises:
        CheckpointError: a layer holds numbers that no layer can have.
    """
    config = checkpoint.config
    if not config.base.get("fingerprint"):  # a foreign format has none
        marks = ((name, checkpoint.qweight(layer)) for name, layer in placed.items())
        config.base["fingerprint"] = fingerprint(marks)
    for name, layer in placed.items():
        pending = model.get_submodule(name)
        made = ShardedQuantLinear(checkpoint.layers[layer], desc_act=config.desc_act, device="meta")
        if not loads_from_rank_0():
            made.set_packed(checkpoint.layer(layer))
        made.stored_name = layer
        made.bias = pending.bias  # type: ignore[assignment]
        model.set_submodule(name, shard(made.train(pending.training)))
    finish_sharding(model)


def shard(layer: ShardedQuantLinear) -> ShardedQuantLinear:
    """Leave this rank its part of a layer, in the training that is set up."""
    if loads_from_rank_0():
        return layer.to("meta")
    if zero3_enabled():
        bias, layer.bias = layer.bias, None  # may not be loaded yet
        partition(layer)
        layer.bias = bias
    return layer


def finish_sharding(model: nn.Module) -> None:
    """Partition what is left under ZeRO-3: embeddings, norms, biases.

    A rank that skipped an expert would not take part in gathering its parts.
    """
    if loads_sharded():
        for experts in find_experts(model).values():
            experts.calls_all = True
    if zero3_enabled():
        partition(model)
