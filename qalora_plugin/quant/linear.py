"""`QuantLinear`: a frozen linear layer of packed integers, scales and real-valued offsets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qalora_kernels import LowRank, PackedWeight, QuantSpec, folded_linear, round_minimum
from qalora_kernels.groups import sum_groups
from qalora_kernels.packing import pack

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
        """That of the dense layer that this one stands for; `.to(dtype)` changes it."""
        self.qweight = nn.Parameter(
            torch.empty(spec.packed_rows, spec.out_features, dtype=torch.int32, device=device),
            requires_grad=False,
        )
        self._register_grid(device)
        g_idx = torch.empty(spec.in_features, dtype=torch.int32, device=device)
        self.register_buffer("g_idx", g_idx if desc_act else None)
        self.bias = (
            nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype))
            if bias
            else None
        )

    def _register_grid(self, device: torch.device | str | None) -> None:
        spec, shape = self.spec, (self.spec.num_groups, self.spec.out_features)
        self.register_buffer("scales", torch.empty(shape, dtype=spec.scales_dtype, device=device))
        self.register_buffer("offsets", torch.empty(shape, dtype=spec.offsets_dtype, device=device))

    @classmethod
    def from_codes(
        cls,
        spec: QuantSpec,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> "QuantLinear":
        """Build a layer from integers [N, K] in [0, 2^bits), scales and offsets [G, N]."""
        layer = cls(spec, bias=bias is not None, desc_act=g_idx is not None, device="meta")
        layer.qweight = nn.Parameter(pack(codes.t(), spec.bits), requires_grad=False)
        layer.scales = scales.detach().to(spec.scales_dtype)
        if spec.minimum_below is not None:
            offsets = round_minimum(offsets, layer.scales, spec.minimum_below, spec.scales_dtype)
        layer.offsets = offsets.detach().to(spec.offsets_dtype)
        layer.g_idx = None if g_idx is None else g_idx.to(torch.int32)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return layer

    @property
    def weight(self) -> AbsentWeight:
        """Shape [N, K], dtype and device for models that look at them; it holds no numbers."""
        shape = (self.out_features, self.in_features)
        return AbsentWeight(shape, self.weight_dtype, self.qweight.device)

    @property
    def weight_t(self) -> torch.Tensor:
        """Dense W^T [K, N], fp32."""
        return self.dequantize_t(torch.float32)

    @property
    def packed(self) -> PackedWeight:
        """Return the weight as the one value that the kernels take."""
        return PackedWeight(self.qweight, self.scales, self.offsets, self.g_idx, self.spec)

    def dequantize_t(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense W^T [K, N] in `dtype`."""
        return self.packed.dequantize(dtype)

    def forward(
        self,
        x: torch.Tensor,
        zeros: LowRank | None = None,
        scale: LowRank | None = None,
    ) -> torch.Tensor:
        """x [..., K] -> [..., N] in the dtype of x (of autocast where it is on).

        With `zeros` or `scale` the adapter is folded into the offsets and scales first.
        """
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._linear(x, self.packed, zeros, scale)

    def _linear(
        self, x: torch.Tensor, weight: PackedWeight, zeros: LowRank | None, scale: LowRank | None
    ) -> torch.Tensor:
        return folded_linear(x, weight, self.bias, zeros=zeros, scale=scale)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Group sums of x [..., K] -> [..., G] in the dtype of x, differentiable."""
        return sum_groups(x, self.g_idx, self.spec.group_size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # a cast of scales or offsets would change the weights that were trained or merged:
        # keep the numbers, follow only the device
        kept = {name: self._buffers.get(name) for name in ("scales", "offsets")}
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device="cpu")).dtype
        for name, before in kept.items():
            if before is None:
                continue
            after = getattr(self, name)
            if after.dtype != before.dtype:
                moved = before if after.device == before.device else before.to(after.device)
                setattr(self, name, moved)
        return self

    def extra_repr(self) -> str:
        """As nn.Linear prints itself, with the grid."""
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, "
            f"bias={self.bias is not None}, bits={spec.bits}, group_size={spec.group_size}, "
            f"desc_act={self.g_idx is not None}"
        )
