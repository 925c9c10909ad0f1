"""Differentiable linear layers over packed integers. Functions only; `ops` does the work.

Folded forward (one matrix product; arXiv 2309.14717 eq. 7 used in training, not only in merging):

    s', o' = fold(s, o, adapters)          rounded as stored, gradient passed straight through
    y      = x W'^T + bias                 W' = s' (q - mid) + o'

Backward, from dy [M, N] (W' is folded and dequantized again, never kept):

    grad_x        = dy W'
    D_zeros       = pool(x)^T dy                    [G, N]   gradient of the offsets' change
    D_scale[g, n] = sum_{k in g} (x^T dy)[k, n] W[n, k]      W = s (q - mid) + o: the change is
                                                             relative to the base's own weight

and `LowRank.gradients` of both. The zeros mode keeps pool(x), K/g numbers a token; only the scales
mode keeps x.
"""

from dataclasses import replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import ops
from .fold import LowRank
from .packed import PackedWeight


class _FoldedLinear(torch.autograd.Function):
    """Compute y = x W'^T + bias; `matrices` are A and B of `zeros` and of `scale`, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        layer: tuple[PackedWeight, PackedWeight, tuple[float, float]],
        *matrices: torch.Tensor | None,
    ) -> torch.Tensor:
        weight, folded, ctx.factors = layer
        needs_zeros, needs_scale = any(ctx.needs_input_grad[3:5]), any(ctx.needs_input_grad[5:7])
        pooled = ops.pool(x, weight.g_idx, weight.spec.group_size) if needs_zeros else None
        kept_x = x if needs_scale else None
        ctx.save_for_backward(*weight.tensors, *matrices, pooled, kept_x)
        ctx.spec = weight.spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear(x, folded, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qweight, scales, offsets, g_idx, za, zb, sa, sb, pooled, x = ctx.saved_tensors
        weight = PackedWeight(qweight, scales, offsets, g_idx, ctx.spec)
        zeros = None if za is None else LowRank(za, zb, ctx.factors[0])
        scale = None if sa is None else LowRank(sa, sb, ctx.factors[1])
        dy = dy.contiguous()
        grads: list[torch.Tensor | None] = [None] * 7
        if ctx.needs_input_grad[0]:
            grads[0] = ops.grad_input(dy, weight.fold(zeros, scale))
        if ctx.needs_input_grad[1]:
            grads[1] = dy.sum(0).to(ctx.bias_dtype)
        if zeros is not None and pooled is not None:
            grads[3:5] = zeros.gradients(ops.pooled_grad(dy, pooled))
        if scale is not None and x is not None:
            grads[5:7] = scale.gradients(ops.weighted_group_grad(dy, x, weight))
        return tuple(grads)


def folded_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    zeros: LowRank | None = None,
    scale: LowRank | None = None,
) -> torch.Tensor:
    """Run a linear layer whose adapter is folded into scales and offsets; see the module.

    Args:
        x: [..., K], any float dtype.
        weight: the frozen layer.
        bias: [N] or None; gradients flow to it.
        zeros: change of the offsets; gradients flow to its `a` and `b`.
        scale: relative change of the scales; likewise.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a tensor's shape, dtype, device or values do not fit (`checks`).
    """
    spec = weight.spec
    if x.shape[-1] != spec.in_features:  # rows are made of x here, so `checks` would not see it
        raise ValueError(
            f"x: expected {spec.in_features} features in the last dimension, "
            f"found shape {tuple(x.shape)}"
        )
    rows = x.reshape(-1, spec.in_features)
    folded = weight.fold(zeros, scale)
    if torch.is_grad_enabled():
        za, zb, zf = (None, None, 1.0) if zeros is None else (zeros.a, zeros.b, zeros.factor)
        sa, sb, sf = (None, None, 1.0) if scale is None else (scale.a, scale.b, scale.factor)
        y = _FoldedLinear.apply(rows, bias, (weight, folded, (zf, sf)), za, zb, sa, sb)
    else:  # evaluation: a Function costs as much as a small product
        y = ops.linear(rows, folded, bias)
    return y.view(*x.shape[:-1], spec.out_features)


class _GridLinear(torch.autograd.Function):
    """Compute y = x W^T + bias, differentiable in scales and offsets [G, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
        weight: PackedWeight,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight.qweight, scales, offsets, weight.g_idx)
        ctx.spec = weight.spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear(x, replace(weight, scales=scales, offsets=offsets), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, qweight, scales, offsets, g_idx = ctx.saved_tensors
        weight = PackedWeight(qweight, scales, offsets, g_idx, ctx.spec)
        dy = dy.contiguous()
        grads: list[torch.Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = ops.grad_input(dy, weight)
        if ctx.needs_input_grad[1]:
            ones, nothing = torch.ones_like(scales), torch.zeros_like(offsets)
            codes = replace(weight, scales=ones, offsets=nothing)  # W = q - mid
            grads[1] = ops.weighted_group_grad(dy, x, codes).to(scales.dtype)
        if ctx.needs_input_grad[2]:
            pooled = ops.pool(x, g_idx, ctx.spec.group_size)
            grads[2] = ops.pooled_grad(dy, pooled).to(offsets.dtype)
        if ctx.needs_input_grad[3]:
            grads[3] = dy.sum(0).to(ctx.bias_dtype)
        return tuple(grads)


def grid_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Run a linear layer whose scales and offsets are trained themselves, the integers frozen.

    With dy [M, N]:

        D_scales[g, n]  = sum_{k in g} (x^T dy)[k, n] (q[n, k] - mid)        [G, N]
        D_offsets       = pool(x)^T dy                                       [G, N]

    Args:
        x: [..., K], any float dtype.
        weight: its integers and groups; its own scales and offsets are not used.
        scales: [G, N], fp32 or fp64; gradients flow to it, and to `offsets` [G, N].
        offsets: likewise.
        bias: [N] or None; gradients flow to it.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a tensor's shape, dtype, device or values do not fit (`checks`).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _GridLinear.apply(rows, scales, offsets, bias, weight)
    return y.view(*x.shape[:-1], weight.spec.out_features)


def quantized_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Run the frozen layer, x [..., K] -> [..., N]: gradients reach x and the bias only.

    Scales and offsets are used as they are, so a merged layer and a folded one agree to the bit.

    Raises:
        ValueError: see `folded_linear`.
    """
    return folded_linear(x, weight, bias)
