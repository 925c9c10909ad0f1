"""The operators, registered with torch.library, so that torch.compile and meta devices see through.

Each op checks its arguments (`checks`: ValueError before any kernel runs) and forwards to the
backend of the device (`backends.get_backend`); its fake kernel states shapes and dtypes only.
Activations are 2-D here: `autograd` flattens.
"""

from collections.abc import Callable

import torch

from . import checks
from .backends import get_backend
from .spec import QuantSpec

_LIBRARY = torch.library.Library("qalora", "DEF")


def _operator(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Register `function` for every device; what is returned goes through torch's dispatcher.

    As torch.library.custom_op, at a third of its cost a call, which a small product would feel:
    derivatives are `autograd`'s, and no operator changes or returns what it was given.
    """
    name = function.__name__
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    operator: Callable[..., torch.Tensor] = getattr(torch.ops.qalora, name).default
    return operator


def _spec(qweight: torch.Tensor, bits: int, group_size: int, in_features: int) -> QuantSpec:
    checks.matrix("qweight", qweight)
    return QuantSpec(bits, group_size, in_features, qweight.shape[1])


def _sums_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@_operator
def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int32 [ceil(K/32)*bits, N], [G, N], [G, N], int32 [K] or None -> W^T [K, N] in `dtype`."""
    spec = _spec(qweight, bits, group_size, in_features)
    checks.packed(qweight, scales, offsets, g_idx, spec)
    checks.output_dtype(dtype)
    return get_backend(qweight.device).dequantize(qweight, scales, offsets, g_idx, spec, dtype)


@torch.library.register_fake("qalora::dequantize", lib=_LIBRARY)
def _(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return qweight.new_empty(in_features, qweight.shape[1], dtype=dtype)


@_operator
def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Sums over the inputs of each group: [M, K] -> [M, G] (arXiv 2309.14717, Algorithm 1)."""
    spec = QuantSpec(4, group_size, x.shape[-1], 1)
    checks.rows("x", x, spec.in_features, x)
    checks.groups(g_idx, spec, x.device)
    return get_backend(x.device).pool(x, g_idx, spec)


@torch.library.register_fake("qalora::pool", lib=_LIBRARY)
def _(
    x: torch.Tensor,
    g_idx: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], -(-x.shape[-1] // group_size))


@_operator
def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """x [M, K] -> x W^T + bias [M, N] in the dtype of x."""
    spec = _spec(qweight, bits, group_size, x.shape[-1])
    checks.packed(qweight, scales, offsets, g_idx, spec)
    checks.rows("x", x, spec.in_features, qweight)
    checks.bias(bias, spec, qweight.device)
    return get_backend(x.device).linear(x, qweight, scales, offsets, g_idx, bias, spec)


@torch.library.register_fake("qalora::linear", lib=_LIBRARY)
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], qweight.shape[1])


@_operator
def grad_input(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    """dy [M, N] -> dy W [M, K] in the dtype of dy."""
    spec = _spec(qweight, bits, group_size, in_features)
    checks.packed(qweight, scales, offsets, g_idx, spec)
    checks.rows("dy", dy, spec.out_features, qweight)
    return get_backend(dy.device).grad_input(dy, qweight, scales, offsets, g_idx, spec)


@torch.library.register_fake("qalora::grad_input", lib=_LIBRARY)
def _(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> torch.Tensor:
    return dy.new_empty(dy.shape[0], in_features)


@_operator
def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """dy [M, N], pool(x) [M, G] -> the gradient of the offsets [G, N], fp32 (or fp64)."""
    checks.rows("dy", dy, dy.shape[-1], dy)
    checks.rows("pooled", pooled, pooled.shape[-1], dy, like_rows=True)
    return get_backend(dy.device).pooled_grad(dy, pooled)


@torch.library.register_fake("qalora::pooled_grad", lib=_LIBRARY)
def _(
    dy: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    return dy.new_empty(pooled.shape[1], dy.shape[1], dtype=_sums_dtype(dy.dtype))


@_operator
def weighted_group_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Gradient of a relative change of the scales, zero-point kept: sum over k in group g of
    (x^T dy)[k, n] * W[n, k]. [M, N], [M, K] -> [G, N], fp32 (or fp64)."""
    spec = _spec(qweight, bits, group_size, x.shape[-1])
    checks.packed(qweight, scales, offsets, g_idx, spec)
    checks.rows("dy", dy, spec.out_features, qweight)
    checks.rows("x", x, spec.in_features, dy, like_rows=True)
    backend = get_backend(dy.device)
    return backend.weighted_group_grad(dy, x, qweight, scales, offsets, g_idx, spec)


@torch.library.register_fake("qalora::weighted_group_grad", lib=_LIBRARY)
def _(
    dy: torch.Tensor,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return dy.new_empty(scales.shape[0], dy.shape[1], dtype=_sums_dtype(dy.dtype))
