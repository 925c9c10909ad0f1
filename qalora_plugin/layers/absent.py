"""What models and transformers are told of the numbers of a quantized layer.

A model that asks for the layer's `weight` gets an `AbsentWeight`. transformers initialises what
lacks its mark, which is spelled here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

_MARK = "_is_hf_initialized"  # transformers' own name


def mark_loaded(layer: nn.Module) -> None:
    """Tell transformers that a layer has its numbers, all but the bias, which it loads itself."""
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name != "bias":
            setattr(tensor, _MARK, True)
    setattr(layer, _MARK, True)


def is_loaded(tensor: torch.Tensor) -> bool:
    """Say whether a tensor has its numbers; a buffer that nothing fills is left uninitialised."""
    return not tensor.is_meta and getattr(tensor, _MARK, False)


class AbsentWeight(torch.Tensor):
    """A weight of the right shape, dtype and device that has no numbers and takes no memory.

    Some architectures look at a layer's `weight.dtype` in their forward (T5), or initialise the
    layer from its parent (T5, ModernBERT), which transformers skips for what is loaded already.

    Args:
        shape: [out_features, in_features].
        dtype: of the dense layer that the quantized one stands for.
        device: of the layer.

    Raises:
        ConfigError: by every operation that needs the numbers.
    """

    _is_hf_initialized = True
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> "AbsentWeight":
        """Make one; see the class for the arguments."""
        return torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=torch.device(device)
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        operation: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        raise ConfigError(
            f"{operation} needs the numbers of a quantized layer's weight, which the layer does "
            "not hold: this model computes with them itself instead of calling the layer. Quantize "
            "it anew with the layer's name in modules_to_not_convert."
        )

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"
