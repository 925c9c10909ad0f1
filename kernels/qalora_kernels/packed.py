"""`PackedWeight`: one quantized weight matrix, the value that every layer of this project passes on."""

from dataclasses import dataclass

import torch

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
