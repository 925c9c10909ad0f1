"""`PackedWeight`: one quantized weight matrix, the value that every layer passes on."""

from dataclasses import dataclass

import torch

from . import ops
from .packing import pack, unpack
from .spec import QuantSpec


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The numbers of one quantized linear layer, and their grid.

    W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n], with g the group of input k.

    Args:
        qweight: int32 [ceil(K/32)*bits, N], in the bit order of `packing`.
        scales: [G, N], any float dtype.
        offsets: [G, N], any float dtype: the weight at the middle code.
        g_idx: int32 [K], the group of each input, or None where that is k // group_size.
        spec: shape and grid.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    g_idx: torch.Tensor | None
    spec: QuantSpec

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
    ) -> "PackedWeight":
        """Pack integers [N, K] in [0, 2^bits); the other arguments are the fields."""
        return cls(pack(codes.t(), spec.bits), scales, offsets, g_idx, spec)

    def codes(self) -> torch.Tensor:
        """Return the integers, uint8 [N, K], contiguous."""
        return unpack(self.qweight, self.spec.bits, self.spec.in_features).t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense weight W^T [K, N], computed in fp32 and rounded once to `dtype`."""
        spec = self.spec
        return ops.dequantize(
            self.qweight,
            self.scales,
            self.offsets,
            self.g_idx,
            spec.bits,
            spec.group_size,
            spec.in_features,
            dtype,
        )
