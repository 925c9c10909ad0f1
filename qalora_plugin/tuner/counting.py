"""PEFT's count of parameters, with a packed layer counted as the weights that it stands for.

`print_trainable_parameters` counts elements of tensors: of a 4-bit layer an eighth of its weights,
and of bitsandbytes' layers, which it knows by name, all.
"""

import functools
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import nn

from ..layers.linear import QuantLinear

_INSTALLED = "_qalora_original"


def _elements(parameter: nn.Parameter) -> int:
    """Return the elements of a parameter as PEFT counts them; ZeRO-3 leaves an empty one."""
    count = parameter.numel()
    return int(getattr(parameter, "ds_numel", 0)) if count == 0 else count


def uncounted_weights(model: nn.Module) -> int:
    """Return by how much the weights of a model's packed layers outnumber their tensors."""
    more = 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            packed = [p for p in module.parameters(recurse=False) if p.dtype == torch.int32]
            more += module.in_features * module.out_features - sum(map(_elements, packed))
    return more


def install() -> None:
    """Wrap PEFT's `get_nb_trainable_parameters`; a second call does nothing."""
    for model_class in (PeftModel, PeftMixedModel):
        original = model_class.get_nb_trainable_parameters
        if hasattr(original, _INSTALLED):
            continue

        @functools.wraps(original)
        def count(self: Any, _original: Any = original) -> tuple[int, int]:
            trainable, everything = _original(self)
            return trainable, everything + uncounted_weights(self)

        setattr(count, _INSTALLED, original)
        model_class.get_nb_trainable_parameters = count
