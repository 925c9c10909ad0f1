"""Fold an adapter into scales and offsets: the merge, and the training forward's first step.

    offsets' = offsets + factor * (B A)^T            adapt="zeros" (arXiv 2309.14717, eq. 7)
    scales'  = scales * (1 + factor * (B A)^T)       adapt="scales": the zero-point stays
    offsets' = scales' * (offsets / scales) [+ zeros' change]  since offsets = scales * (mid - z)

Training and merging call this one function, so what was trained is what is shipped, to the bit.
It computes in float64 and rounds once: then a GPU and a laptop round to the same fp16 number, and
the cost, N*G*r operations, is far below that of the layer's matrix product.
"""

from dataclasses import dataclass

import torch

from .spec import SCALES_DTYPE, QuantSpec


@dataclass(frozen=True)
class LowRank:
    """One low-rank change `factor * (B A)^T`.

    Args:
        a: [r, G].
        b: [N, r].
        factor: LoRA's scaling (lora_alpha / r, or / sqrt(r)) times the convention's factor: 1 for
            the paper's sum, 1/g for the authors' code (mean), G/g for PEFT's `use_qalora`.
    """

    a: torch.Tensor
    b: torch.Tensor
    factor: float

    def delta(self) -> torch.Tensor:
        """The change, float64 [G, N]."""
        # the factor goes onto B, which is small
        return self.a.t().double() @ (self.b.t().double() * self.factor)


def total_delta(parts: "list[LowRank]") -> torch.Tensor | None:
    """Sum of several changes, float64 [G, N]; None where there is none."""
    total = None
    for part in parts:
        total = part.delta() if total is None else total + part.delta()
    return total


def round_minimum(
    offsets: torch.Tensor, scales: torch.Tensor, steps: int, dtype: torch.dtype
) -> torch.Tensor:
    """Offsets such that `dtype` holds the minimum, the weight `steps` scales below the offset.

    The minimum is rounded, and that plus steps * scale returned. Rounding again changes nothing.
    With fp16 minima and scales the returned fp32 number is exact, unless a group's weights are all
    the same to 2^-12 of themselves: then steps * scale has bits that fp32 drops.

    Args:
        offsets: [G, N].
        scales: [G, N], positive.
        steps: `QuantSpec.minimum_below`, a power of two.
        dtype: of the minimum.

    Returns:
        [G, N] in fp32, or fp64 where `scales` are.
    """
    return _above(_minimum(offsets, scales, steps, dtype), scales, steps)


def _minimum(
    offsets: torch.Tensor, scales: torch.Tensor, steps: int, dtype: torch.dtype
) -> torch.Tensor:
    scales = scales.to(_wide(scales.dtype))
    minimum = torch.empty_like(scales, dtype=dtype)
    return torch.sub(offsets, scales, alpha=steps, out=minimum)


def _above(minimum: torch.Tensor, scales: torch.Tensor, steps: int) -> torch.Tensor:
    return minimum.to(_wide(scales.dtype), copy=True).add_(scales, alpha=steps)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def store_offsets(offsets: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """What a checkpoint holds as `offsets`, [G, N] in `spec.stored_dtype`.

    The offsets, or with offsets_at "minimum" the minima, each `spec.mid` scales below its offset.

    Args:
        offsets: [G, N], rounded as `spec` says (`round_minimum`, `fold`).
        scales: [G, N].
        spec: the layer's grid.
    """
    if spec.minimum_below is None:
        return offsets.to(spec.stored_dtype)
    return _minimum(offsets, scales, spec.minimum_below, spec.stored_dtype)


def load_offsets(stored: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The inverse of `store_offsets`: the offsets, [G, N] in `spec.offsets_dtype`.

    What `store_offsets` wrote comes back bit for bit. Of a minimum from elsewhere that is less than
    2^-12 of mid * scale fp32 drops the last bits, once: storing and loading again keeps the rest.
    """
    if spec.minimum_below is None:
        return stored.to(spec.offsets_dtype)
    return _above(stored, scales, spec.minimum_below).to(spec.offsets_dtype)


@torch.no_grad()
def fold(
    scales: torch.Tensor,
    offsets: torch.Tensor,
    *,
    zeros: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    offsets_dtype: torch.dtype = torch.float16,
    scales_dtype: torch.dtype = SCALES_DTYPE,
    minimum_below: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets with the changes folded in, rounded to what a checkpoint stores.

    Not differentiable: the gradients of the folded layer are `autograd`'s.

    Args:
        scales: [G, N], any float dtype, values that `scales_dtype` holds.
        offsets: [G, N], likewise for `offsets_dtype`.
        zeros: change of the offsets, [G, N]; see `LowRank.delta`.
        scale: relative change of the scales, [G, N].
        offsets_dtype: stored dtype of the offsets.
        scales_dtype: stored dtype of the scales.
        minimum_below: `QuantSpec.minimum_below`: round the weight that many steps below the
            offset, to `scales_dtype`, instead of the offset; None to round the offset.

    Returns:
        (scales', offsets') in the dtype of the inputs.
    """
    new_scales, new_offsets = scales, offsets
    if scale is not None:
        new_scales = (scales.double() * (1 + scale)).to(scales_dtype).to(scales.dtype)
        # (offsets / scales) is the exact mid - z of a stock base, so its integer z survives
        new_offsets = new_scales.double() * (offsets / scales.double())
    if minimum_below is not None:
        exact = new_offsets.double() if zeros is None else new_offsets + zeros
        rounded = round_minimum(exact, new_scales, minimum_below, scales_dtype).to(offsets_dtype)
    elif zeros is None:
        rounded = new_offsets.to(offsets_dtype)
    else:
        # added in float64 and rounded in one pass: what folding costs is passes over [G, N]
        rounded = torch.empty_like(offsets, dtype=offsets_dtype)
        torch.add(new_offsets, zeros, out=rounded)
    return new_scales, rounded.to(offsets.dtype)
