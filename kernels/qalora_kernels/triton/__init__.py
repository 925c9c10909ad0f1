"""INT-n operators on Triton. Contract: `backends.Backend`; float64 goes to the torch backend.

Importing this imports Triton but touches no device. On CPU tensors the kernels run under Triton's
interpreter only (TRITON_INTERPRET=1), for tests.
"""

import torch

from .. import torch_backend
from ..spec import QuantSpec
from . import gradients, matmul
from . import pool as _pool
from .dequantize import dequantize as _dequantize


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W^T [K, N] in `dtype`."""
    if dtype == torch.float64:
        return torch_backend.dequantize(qweight, scales, offsets, g_idx, spec, dtype)
    out = qweight.new_empty(spec.in_features, spec.out_features, dtype=dtype)
    return _dequantize(qweight, scales, offsets, g_idx, spec, out)


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Group sums of x [M, K] -> [M, G]."""
    if x.dtype == torch.float64:
        return torch_backend.pool(x, g_idx, spec)
    return _pool.pool(x, g_idx, spec)


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
    serve = torch_backend if x.dtype == torch.float64 else matmul
    return serve.linear(x, qweight, scales, offsets, g_idx, bias, spec)


def grad_input(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """dy [M, N] -> dy W [M, K]."""
    serve = torch_backend if dy.dtype == torch.float64 else matmul
    return serve.grad_input(dy, qweight, scales, offsets, g_idx, spec)


def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """[M, N], [M, G] -> pool(x)^T dy [G, N]."""
    serve = torch_backend if dy.dtype == torch.float64 else gradients
    return serve.pooled_grad(dy, pooled)


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
    serve = torch_backend if dy.dtype == torch.float64 else gradients
    return serve.weighted_group_grad(dy, x, qweight, scales, offsets, g_idx, spec)
