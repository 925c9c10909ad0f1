"""`QuantLinear`: a frozen linear layer of packed integers, scales and real-valued offsets."""

import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from qalora_kernels import LowRank, PackedWeight, QuantSpec, folded_linear, round_minimum
from qalora_kernels.groups import sum_groups

from .absent import AbsentWeight


class QuantLinear(nn.Module):
    """y = x W^T + bias with W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n].

    `qweight` is an int32 Parameter without gradient: ZeRO-3 shards it, DDP leaves it alone.
    `scales` and `offsets` are buffers in the checkpoint's dtypes, which every computation widens;
    no `.to(dtype)`, `.half()` or `.bfloat16()` touches them.

    Args:
        spec: shape and grid.
        bias: whether the layer has a bias.
        desc_act: whether the groups follow `g_idx` instead of k // group_size.
        device: where the (uninitialised) tensors are made, e.g. "meta".
        dtype: of the bias, and what `weight.dtype` says; torch's default dtype where None.
    """

    g_idx: torch.Tensor | None
    scales: torch.Tensor
    offsets: torch.Tensor
    stored_name: str | None = None
    """The layer's name in the checkpoint that it was loaded from."""

    def __init__(
        self,
        spec: QuantSpec,
        *,
        bias: bool = False,
        desc_act: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.weight_dtype = dtype or torch.get_default_dtype()
        """The dtype of the dense layer that this one stands for; `.to(dtype)` changes it."""
        empty = functools.partial(torch.empty, device=device)
        qweight = empty(spec.packed_rows, spec.out_features, dtype=torch.int32)
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        self._register_grid(device)
        g_idx = empty(spec.in_features, dtype=torch.int32)
        self.register_buffer("g_idx", g_idx if desc_act else None)
        self.bias = nn.Parameter(empty(spec.out_features, dtype=dtype)) if bias else None

    def _register_grid(self, device: torch.device | str | None) -> None:
        spec, shape = self.spec, (self.spec.num_groups, self.spec.out_features)
        self.register_buffer("scales", torch.empty(shape, dtype=spec.scales_dtype, device=device))
        self.register_buffer("offsets", torch.empty(shape, dtype=spec.offsets_dtype, device=device))

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: torch.Tensor | None = None) -> Self:
        """Build a layer that holds a weight's numbers; a bias [N] that is a Parameter is kept."""
        layer = cls(weight.spec, desc_act=weight.g_idx is not None, device="meta")
        layer.set_packed(weight)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @property
    def packed(self) -> PackedWeight:
        """The layer's numbers as one value, which shares the layer's memory."""
        return PackedWeight(self.qweight, self.scales, self.offsets, self.g_idx, self.spec)

    def set_packed(self, weight: PackedWeight) -> None:
        """Take over a weight's numbers, rounded to the dtypes of the layer's own `spec`.

        They go to the device of the layer, or stay where they are if the layer is on "meta".
        """
        device = weight.qweight.device if self.qweight.is_meta else self.qweight.device
        for name, tensor in self._stored(weight).items():
            tensor = tensor.to(device)
            if name in self._parameters:
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(self, name, tensor)

    def _stored(self, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Return the layer's own tensors for a weight, by their names in the layer."""
        spec, offsets = self.spec, weight.offsets.detach()
        scales = weight.scales.detach().to(spec.scales_dtype)
        if spec.minimum_below is not None:
            offsets = round_minimum(offsets, scales, spec.minimum_below, spec.scales_dtype)
        offsets = offsets.to(spec.offsets_dtype)
        stored = {"qweight": weight.qweight, "scales": scales, "offsets": offsets}
        if weight.g_idx is not None:
            stored["g_idx"] = weight.g_idx.to(torch.int32)
        return stored

    @property
    def weight(self) -> AbsentWeight:
        """The shape [N, K], dtype and device that some models look at; it holds no numbers."""
        shape = (self.out_features, self.in_features)
        return AbsentWeight(shape, self.weight_dtype, self.qweight.device)

    def forward(
        self,
        x: torch.Tensor,
        zeros: LowRank | None = None,
        scale: LowRank | None = None,
    ) -> torch.Tensor:
        """Compute x W^T + bias.

        Args:
            x: [..., K], any float dtype.
            zeros: a change of the offsets, folded in first; gradients flow to its A and B.
            scale: a relative change of the scales, likewise.

        Returns:
            [..., N] in the dtype of x, or of autocast where that is on.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._linear(x, self.packed, zeros, scale)

    def _linear(
        self, x: torch.Tensor, weight: PackedWeight, zeros: LowRank | None, scale: LowRank | None
    ) -> torch.Tensor:
        return folded_linear(x, weight, self.bias, zeros=zeros, scale=scale)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Sum x [..., K] over the inputs of each group: [..., G] in its dtype, differentiable."""
        return sum_groups(x, self.g_idx, self.spec.group_size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # a cast of scales or offsets would change the weights that were trained or merged:
        # keep the numbers, follow only the device
        before = {name: kept for name, kept in self._buffers.items() if kept is not None}
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        for name, kept in before.items():
            moved = getattr(self, name)
            if moved.dtype != kept.dtype:
                setattr(self, name, kept.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, with its grid."""
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, "
            f"bias={self.bias is not None}, bits={spec.bits}, group_size={spec.group_size} "
            f"({spec.num_groups} groups), desc_act={self.g_idx is not None}"
            + (f", offsets_at={spec.offsets_at!r}" if spec.offsets_at == "minimum" else "")
        )
