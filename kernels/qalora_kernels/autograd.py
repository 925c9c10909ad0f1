"""Differentiable linear layers over packed integers. Functions only; `ops` does the work.

Folded forward (one matrix product; arXiv 2309.14717 eq. 7 used in training, not only in merging):

    s', o' = fold(s, o, adapters)          rounded as stored, gradient passed straight through
    y      = x W'^T + bias                 W' = s' (q - mid) + o'

Backward, from dy [M, N] (W' is dequantized again, never kept):

    grad_x        = dy W'
    D_zeros       = pool(x)^T dy                    [G, N]   gradient of the offsets' change
    D_scale[g, n] = sum_{k in g} (x^T dy)[k, n] W[n, k]      W = s (q - mid) + o: the change is
                                                             relative to the base's own weight
    grad_A        = factor * B^T D^T                [r, G]
    grad_B        = factor * D^T A^T                [N, r]

The zeros mode keeps pool(x), K/g numbers a token; only the scales mode keeps x.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import ops
from .fold import LowRank, fold
from .spec import QuantSpec


def _low_rank_grads(
    d: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """D [G, N] -> (grad_A [r, G], grad_B [N, r]) in the dtypes of A and B."""
    grad_a = factor * (b.t().to(d.dtype) @ d.t())
    grad_b = factor * (d.t() @ a.t().to(d.dtype))
    return grad_a.to(a.dtype), grad_b.to(b.dtype)


def _delta(a: torch.Tensor | None, b: torch.Tensor | None, factor: float) -> torch.Tensor | None:
    return None if a is None or b is None else LowRank(a, b, factor).delta()


def _rows(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """[..., K] -> [M, K]; the operators see K only through x, so it is checked here."""
    if x.shape[-1] != spec.in_features:
        raise ValueError(
            f"x: expected {spec.in_features} features in the last dimension, "
            f"found shape {tuple(x.shape)}"
        )
    return x.reshape(-1, spec.in_features)


class _FoldedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        bias: torch.Tensor | None,
        za: torch.Tensor | None,
        zb: torch.Tensor | None,
        sa: torch.Tensor | None,
        sb: torch.Tensor | None,
        zeros_factor: float,
        scale_factor: float,
        spec: QuantSpec,
    ) -> torch.Tensor:
        new_scales, new_offsets = fold(
            scales,
            offsets,
            zeros=_delta(za, zb, zeros_factor),
            scale=_delta(sa, sb, scale_factor),
            offsets_dtype=spec.offsets_dtype,
            scales_dtype=spec.scales_dtype,
            minimum_below=spec.minimum_below,
        )
        pooled = None
        if za is not None:
            pooled = ops.pool(x, g_idx, spec.group_size)
        kept_x = x if sa is not None else None
        ctx.save_for_backward(qweight, scales, offsets, g_idx, za, zb, sa, sb, pooled, kept_x)
        ctx.factors = (zeros_factor, scale_factor)
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear(
            x, qweight, new_scales, new_offsets, g_idx, bias, spec.bits, spec.group_size
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qweight, scales, offsets, g_idx, za, zb, sa, sb, pooled, x = ctx.saved_tensors
        zeros_factor, scale_factor = ctx.factors
        spec: QuantSpec = ctx.spec
        dy = dy.contiguous()
        grads: list[torch.Tensor | None] = [None] * 13
        if ctx.needs_input_grad[0]:
            new_scales, new_offsets = fold(
                scales,
                offsets,
                zeros=_delta(za, zb, zeros_factor),
                scale=_delta(sa, sb, scale_factor),
                offsets_dtype=spec.offsets_dtype,
                scales_dtype=spec.scales_dtype,
                minimum_below=spec.minimum_below,
            )
            grads[0] = ops.grad_input(
                dy,
                qweight,
                new_scales,
                new_offsets,
                g_idx,
                spec.bits,
                spec.group_size,
                spec.in_features,
            )
        if ctx.needs_input_grad[5]:
            grads[5] = dy.sum(0).to(ctx.bias_dtype)
        if pooled is not None and (ctx.needs_input_grad[6] or ctx.needs_input_grad[7]):
            d = ops.pooled_grad(dy, pooled)
            grads[6], grads[7] = _low_rank_grads(d, za, zb, zeros_factor)
        if x is not None and (ctx.needs_input_grad[8] or ctx.needs_input_grad[9]):
            d = ops.weighted_group_grad(
                dy, x, qweight, scales, offsets, g_idx, spec.bits, spec.group_size
            )
            grads[8], grads[9] = _low_rank_grads(d, sa, sb, scale_factor)
        return tuple(grads)


def folded_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    spec: QuantSpec,
    zeros: LowRank | None = None,
    scale: LowRank | None = None,
) -> torch.Tensor:
    """Linear layer whose adapter is folded into scales and offsets; see the module's docstring.

    Args:
        x: [..., K], any float dtype.
        qweight: int32 [ceil(K/32)*bits, N].
        scales: [G, N] fp32 (fp64 for a float64 layer).
        offsets: [G, N], likewise.
        g_idx: int32 [K], or None where the group of input k is k // group_size.
        bias: [N] or None.
        spec: the layer's grid.
        zeros: change of the offsets; gradients flow to its `a` and `b`.
        scale: relative change of the scales; likewise.

    Returns:
        [..., N] in the dtype of x.

    Raises:
        ValueError: a tensor's shape, dtype, device or values do not fit (`checks`).
    """
    za, zb, zf = (None, None, 1.0) if zeros is None else (zeros.a, zeros.b, zeros.factor)
    sa, sb, sf = (None, None, 1.0) if scale is None else (scale.a, scale.b, scale.factor)
    rows = _rows(x, spec)
    y = _FoldedLinear.apply(
        rows, qweight, scales, offsets, g_idx, bias, za, zb, sa, sb, zf, sf, spec
    )
    return y.view(*x.shape[:-1], spec.out_features)


def quantized_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    spec: QuantSpec,
) -> torch.Tensor:
    """The frozen layer, x [..., K] -> [..., N]: gradients reach x and the bias only.

    Scales and offsets are used as they are, so a merged layer and a folded one agree to the bit.
    """
    rows = _rows(x, spec)
    if torch.is_grad_enabled():
        y = _QuantizedLinear.apply(rows, qweight, scales, offsets, g_idx, bias, spec)
    else:  # generation: a Function costs as much as a small product
        y = ops.linear(rows, qweight, scales, offsets, g_idx, bias, spec.bits, spec.group_size)
    return y.view(*x.shape[:-1], spec.out_features)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        bias: torch.Tensor | None,
        spec: QuantSpec,
    ) -> torch.Tensor:
        ctx.save_for_backward(qweight, scales, offsets, g_idx)
        ctx.spec = spec
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.linear(x, qweight, scales, offsets, g_idx, bias, spec.bits, spec.group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        qweight, scales, offsets, g_idx = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        dy = dy.contiguous()
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.grad_input(
                dy,
                qweight,
                scales,
                offsets,
                g_idx,
                spec.bits,
                spec.group_size,
                spec.in_features,
            )
        if ctx.needs_input_grad[5]:
            grad_bias = dy.sum(0).to(ctx.bias_dtype)
        return grad_x, None, None, None, None, grad_bias, None
