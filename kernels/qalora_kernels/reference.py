"""The dense formula, as plain as it can be: the oracle of the tests and of `verify`.

W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n]   with g the group of input k
y       = x W^T + factor * pool(x) A^T B^T + bias                 (arXiv 2309.14717, eq. 5-7)

It shares the bit order (`packing`) with the operators, and nothing else.
"""

import torch

from . import packing
from .groups import expand, group_index
from .packed import PackedWeight


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return dense W^T [K, N], all of it computed in `dtype`; differentiable."""
    spec = weight.spec
    codes = packing.unpack(weight.qweight, spec.bits, spec.in_features).to(dtype) - spec.mid
    scales, offsets = (
        expand(values.to(dtype), weight.g_idx, spec.group_size, spec.in_features)
        for values in (weight.scales, weight.offsets)
    )
    return codes * scales + offsets


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Return the sum of the inputs of each group, by a dense 0/1 matrix: [..., K] -> [..., G]."""
    k = x.shape[-1]
    groups = -(-k // group_size)
    index = group_index(g_idx, group_size, k, x.device).long()
    member = torch.nn.functional.one_hot(index, groups).to(x.dtype)
    return x @ member
