"""Learning rates of an adapter's two parts: the offsets' and the scales'."""

import math
from typing import Any

from torch import nn

from ..errors import ConfigError
from .names import SCALE_PREFIX

SCALE_LR_RATIO = 3.0
"""Learning rate of the scales' part over that of the rest (docs/adapt_modes.md has the sweep)."""


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    scale_lr_ratio: float = SCALE_LR_RATIO,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return what is trained in `model`, as the parameter groups of a torch optimizer.

        trainer.optimizer = torch.optim.AdamW(parameter_groups(trainer.model, lr=2e-4))

    Weight decay leaves out biases and norms, as in the Trainer. The first group has `lr` wherever
    there is a parameter of that rate, so that the Trainer logs it.

    Args:
        model: with QALORA adapters, or any other.
        lr: learning rate of everything but the scales' part.
        scale_lr_ratio: that of the scales' part (`adapt="scales"` or `"both"`) is lr times this.
        weight_decay: of the parameters that decay.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, at most four; none is empty.

    Raises:
        ConfigError: nothing in the model is trained, or the ratio is not a positive number.
    """
    from transformers import Trainer  # on use: the Axolotl settings import this module as well

    if not 0 < scale_lr_ratio < math.inf:
        raise ConfigError(
            f"parameter_groups: scale_lr_ratio: expected a positive number, found {scale_lr_ratio}"
        )
    # the method reads nothing of its trainer, and is the one place that knows what decays
    decays = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (SCALE_PREFIX in name, name not in decays)
            groups.setdefault(key, []).append(parameter)
    if not groups:
        raise ConfigError(
            "parameter_groups: expected parameters that require gradients, found none. Add an "
            "adapter first: get_peft_model(model, QALoRAConfig(...))"
        )
    return [
        {
            "params": groups[scale, plain],
            "lr": lr * scale_lr_ratio if scale else lr,
            "weight_decay": 0.0 if plain else weight_decay,
        }
        for scale, plain in sorted(groups)
    ]
