"""The dense formula, as plain as it can be: the oracle of the tests, any float dtype.

W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n]   with g the group of input k
y       = x W^T + factor * pool(x) A^T B^T + bias                 (arXiv 2309.14717, eq. 5-7)
"""

import torch

from . import packing
from .groups import expand, group_index


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """Dense W^T [K, N] in the dtype of `scales`, differentiable in scales and offsets."""
    codes = packing.unpack(qweight, bits, in_features).to(scales.dtype) - (1 << (bits - 1))
    return codes * expand(scales, g_idx, group_size, in_features) + expand(
        offsets, g_idx, group_size, in_features
    )


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Sum of the inputs of each group by a dense 0/1 matrix: [..., K] -> [..., G]."""
    k = x.shape[-1]
    groups = -(-k // group_size)
    index = group_index(g_idx, group_size, k, x.device).long()
    member = torch.nn.functional.one_hot(index, groups).to(x.dtype)
    return x @ member


def linear(
    x: torch.Tensor,
    weight_t: torch.Tensor,
    bias: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    factor: float = 1.0,
) -> torch.Tensor:
    """y = x W^T + factor * pool(x) A^T B^T + bias, each term as it stands."""
    y = x @ weight_t
    if pooled is not None and lora_a is not None and lora_b is not None:
        y = y + factor * (pooled @ lora_a.t() @ lora_b.t())
    return y if bias is None else y + bias
