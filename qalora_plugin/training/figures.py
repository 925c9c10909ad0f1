"""`FiguresCallback`: how far training has moved the offsets, in steps of the INT-n grid."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qalora_kernels import LowRank

from ..distributed.sharding import gathered
from ..layers.linear import QuantLinear
from ..layers.sharded import ShardedQuantLinear, unpack_grid
from ..tuner.layer import QALoRALinear

_KINDS = {
    "offset_change": ("qalora_A", "qalora_B"),
    "scale_change": ("qalora_scale_A", "qalora_scale_B"),
}


def layer_changes(model: nn.Module) -> dict[str, dict[str, float]]:
    """What the active adapters change, by kind and name of the layer.

    Returns:
        "offset_change": root mean square over groups and outputs of the change of the offsets,
        divided by the scale, that is in steps between two integers. "scale_change": that of the
        relative change of the scales. Only the kinds that are trained.

    Args:
        model: with QALORA adapters. Under ZeRO-3 and FSDP every process has to call.
    """
    changes: dict[str, dict[str, float]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QALoRALinear):
            continue
        for kind, (name_a, name_b) in _KINDS.items():
            total = _total(layer, name_a, name_b)
            if total is None:
                continue
            if kind == "offset_change":
                total = total / _scales(layer.base_layer)
                total = total[total.isfinite()]  # a group of equal weights has no step
            value = total.square().mean().sqrt().item()
            changes.setdefault(kind, {})[_plain(name)] = round(value, 6)
    return changes


def _total(layer: QALoRALinear, name_a: str, name_b: str) -> torch.Tensor | None:
    """Sum over the active adapters of scaling * (B A)^T, [G, N]."""
    total = None
    for adapter in layer.active_adapters:
        weights = dict(layer.matrices(adapter))
        if name_a not in weights:
            continue
        a, b = gathered([weights[name_a], weights[name_b]])
        change = LowRank(a, b, layer.scaling[adapter]).delta()
        total = change if total is None else total + change
    return total


def _scales(layer: QuantLinear) -> torch.Tensor:
    if isinstance(layer, ShardedQuantLinear):
        return unpack_grid(gathered([layer.grid])[0], layer.spec)[0]
    return layer.scales


def _plain(name: str) -> str:
    """Name in the base model."""
    return name.removeprefix("base_model.model.").removeprefix("model.")


class FiguresCallback(TrainerCallback):
    """Adds the change of the offsets to what a Trainer logs.

        trainer.add_callback(FiguresCallback(trainer))

    Mean and largest of `layer_changes` join the row of the training loss (`log_history`, console).
    Those of every layer go to wandb, trackio, TensorBoard and their like alone: hundreds of
    numbers would bury the console.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Keep the trainer, whose other callbacks are the way to wandb and its like."""
        self._trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Extend a row that has the training loss."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        summary: dict[str, float] = {}
        layers: dict[str, float] = {}
        for kind, values in layer_changes(kwargs["model"]).items():
            summary[f"qalora/{kind}"] = round(sum(values.values()) / len(values), 6)
            summary[f"qalora/{kind}_max"] = max(values.values())
            layers |= {f"qalora/{kind}/{name}": value for name, value in values.items()}
        logs.update(summary)
        state.log_history[-1].update(summary)
        # by hand, because these stand before this callback and have seen the row already
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, _REPORTERS):
                callback.on_log(args, state, control, **kwargs | {"logs": summary | layers})


_REPORTERS = tuple(set(INTEGRATION_TO_CALLBACK.values()))
