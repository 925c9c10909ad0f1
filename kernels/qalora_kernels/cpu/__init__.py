"""INT-n operators on the CPU. Contract: `backends.Backend`.

Many rows: compiled code dequantizes W^T into a reused workspace, then one matrix product of
torch's. A few rows: the weights are unpacked in registers and never written. What the compiled
code does not serve (fp16, fp64, no C compiler) the plain PyTorch code of `torch_backend` does.
"""

import torch

from .. import torch_backend
from ..spec import QuantSpec
from . import native
from .workspace import workspace

FEW_ROWS = 32
"""Up to so many rows unpacking in registers wins; in bf16 it loses at twice as many."""

FEW_ROWS_WEIGHTS = 1 << 18
"""Weights from which on that pays: below, Python's own cost is the same either way."""

# torch's own reduction and matrix product leave nothing to gain
pool = torch_backend.pool
pooled_grad = torch_backend.pooled_grad


def _dequantize_into(
    out: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Write W^T to `out` [K, N]."""
    if native.dequantizes(out.dtype):
        native.dequantize(out, qweight, scales, offsets, g_idx, spec)
    else:
        torch_backend.dequantize_into(out, qweight, scales, offsets, g_idx, spec)
    return out


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W^T [K, N] in `dtype`, with the bits that `torch_backend` computes."""
    out = torch.empty(spec.in_features, spec.out_features, dtype=dtype)
    return _dequantize_into(out, qweight, scales, offsets, g_idx, spec)


def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """x [M, K] -> x W^T + bias [M, N]."""
    few = x.shape[0] <= FEW_ROWS and spec.in_features * spec.out_features >= FEW_ROWS_WEIGHTS
    if few and native.multiplies(x.dtype):
        return native.multiply(x, qweight, scales, offsets, g_idx, bias, spec)
    weight = workspace((spec.in_features, spec.out_features), x.dtype)
    _dequantize_into(weight, qweight, scales, offsets, g_idx, spec)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight.t(), bias)


def grad_input(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """dy [M, N] -> dy W [M, K]."""
    weight = workspace((spec.in_features, spec.out_features), dy.dtype)
    return dy @ _dequantize_into(weight, qweight, scales, offsets, g_idx, spec).t()


def weighted_group_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> [G, N]."""
    if not native.dequantizes(dy.dtype):
        return torch_backend.weighted_group_grad(dy, x, qweight, scales, offsets, g_idx, spec)
    product = workspace((spec.in_features, spec.out_features), dy.dtype)
    torch.mm(x.t(), dy, out=product)
    return native.group_grad(product, qweight, scales, offsets, g_idx, spec)
