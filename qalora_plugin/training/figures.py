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

_KINDS = {"offset_change": "zeros", "scale_change": "scales"}


def layer_changes(model: nn.Module) -> dict[str, dict[str, float]]:
    """Measure how much the active adapters change each layer.

    Args:
        model: with QALORA adapters. Under ZeRO-3 and FSDP every process has to call.

    Returns:
        By kind, and by the layer's name, the root mean square over groups and outputs.
        "offset_change" is the change of the offsets divided by the scale, that is in steps between
        two integers; "scale_change" is the relative change of the scales. A kind that is not
        trained is left out.
    """
    changes: dict[str, dict[str, float]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, QALoRALinear):
            continue
        for kind, part in _KINDS.items():
            total = _total(layer, part)
            if total is None:
                continue
            if kind == "offset_change":
                scales = _scales(layer.base_layer)
                stepped = scales != 0  # a group of equal weights has no step
                if not stepped.any():
                    continue
                total = total[stepped] / scales[stepped]
            value = total.square().mean().sqrt().item()
            plain = name.removeprefix("base_model.model.").removeprefix("model.")
            changes.setdefault(kind, {})[plain] = round(value, 6)
    return changes


def _total(layer: QALoRALinear, part: str) -> torch.Tensor | None:
    """Sum scaling * (B A)^T over the active adapters: float64 [G, N], None without any."""
    total = None
    for adapter in layer.active_adapters:
        change = layer.change(part, [adapter])
        if change is not None:
            a, b = gathered([change.a, change.b])
            delta = LowRank(a, b, change.factor).delta()
            total = delta if total is None else total + delta
    return total


def _scales(layer: QuantLinear) -> torch.Tensor:
    if isinstance(layer, ShardedQuantLinear):
        return unpack_grid(gathered([layer.grid])[0], layer.spec)[0]
    return layer.scales


class FiguresCallback(TrainerCallback):
    """Adds how far training has moved the offsets to what a Trainer logs.

        trainer.add_callback(FiguresCallback(trainer))

    The mean and the largest value of `layer_changes` join the row of the training loss
    (`log_history`, console). The values of every layer go only to wandb, trackio, TensorBoard and
    similar trackers: hundreds of numbers would bury the console.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Keep the trainer, whose other callbacks report to wandb and similar trackers."""
        self._trainer = trainer

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Extend a row of the log, if it has the training loss."""
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
        # called by hand: these stand before this callback, and have already seen the row
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, _REPORTERS):
                callback.on_log(args, state, control, **kwargs | {"logs": summary | layers})


_REPORTERS = tuple(set(INTEGRATION_TO_CALLBACK.values()))
