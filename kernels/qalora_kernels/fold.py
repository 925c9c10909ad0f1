"""Fold an adapter into scales and offsets: the merge, and the training forward's first step.

    offsets' = offsets + factor * (B A)^T            adapt="zeros" (arXiv 2309.14717, eq. 7)
    scales'  = scales * (1 + factor * (B A)^T)       adapt="scales": the zero-point stays
    offsets' = scales' * (offsets / scales) [+ zeros' change]  since offsets = scales * (mid - z)
               offsets * (1 + factor * (B A)^T)  where a scale is 0: the change is one of the weight

Scales are signed: MLX's files have about as many negative ones as positive ones, and GGUF's have
zeros, of groups whose weights are all the same.

Training and merging call this one function, so what was trained is what is shipped, to the bit.
It computes in float64 and rounds once: then a GPU and a laptop round to the same fp16 number, and
the cost, N*G*r operations, is far below that of the layer's matrix product.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .spec import QuantSpec, wide

if TYPE_CHECKING:
    from .packed import PackedWeight


_CACHED = 1 << 16  # float64 numbers


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
        """Return the change, float64 [G, N]."""
        a, b = self._factors()
        return a @ b

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float64 [G, r] and [r, N], whose product the change is."""
        # the factor goes onto B, which is small
        return self.a.t().double(), self.b.t().double() * self.factor

    def gradients(self, d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of A and B, in their dtypes, given that of the change, [G, N].

        grad_A = factor * B^T D^T [r, G]     grad_B = factor * D^T A^T [N, r]
        """
        grad_a = self.factor * (self.b.t().to(d.dtype) @ d.t())
        grad_b = self.factor * (d.t() @ self.a.t().to(d.dtype))
        return grad_a.to(self.a.dtype), grad_b.to(self.b.dtype)


@torch.no_grad()
def fold(weight: "PackedWeight", zeros: LowRank | None, scale: LowRank | None) -> "PackedWeight":
    """Return the weight with the changes folded in, rounded to what a checkpoint stores.

    Not differentiable: the gradients of the folded layer are `autograd`'s.

    Args:
        weight: its scales and offsets hold values that its spec's dtypes hold.
        zeros: change of the offsets.
        scale: relative change of the scales.

    Returns:
        The same integers with new scales and offsets, in the dtypes of the old ones.
    """
    factors = [None if change is None else change._factors() for change in (zeros, scale)]
    folded: list[tuple[torch.Tensor, torch.Tensor]] = []
    for rows in _in_cache(weight.scales):
        deltas = (None if pair is None else pair[0][rows] @ pair[1] for pair in factors)
        folded.append(_folded(weight.spec, weight.scales[rows], weight.offsets[rows], *deltas))
    scales, offsets = folded[0] if len(folded) == 1 else map(torch.cat, zip(*folded, strict=True))
    return replace(weight, scales=weight.scales if scale is None else scales, offsets=offsets)


def _in_cache(grid: torch.Tensor) -> Iterator[slice]:
    """Yield groups whose numbers stay in a core's cache: what folding costs is passes over them."""
    groups, columns = grid.shape
    step = groups
    if grid.device.type == "cpu" and not torch.compiler.is_compiling():
        step = max(1, _CACHED // max(columns, 1))
    for start in range(0, max(groups, 1), max(step, 1)):
        yield slice(start, start + step)


def _folded(
    spec: QuantSpec,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    change: torch.Tensor | None,
    relative: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return new scales and offsets of some groups, given the changes in float64."""
    dtypes = scales.dtype, offsets.dtype
    if relative is not None:
        share, before = 1 + relative, scales
        scales = (scales.double() * share).to(spec.scales_dtype).to(dtypes[0])
        # (offsets / scales) is the exact mid - z of a stock base, so its integer z survives
        kept = scales.double() * (offsets / before.double())
        offsets = torch.where(before == 0, offsets * share, kept)
    if spec.minimum_below is not None:
        exact = offsets.double() if change is None else offsets + change
        offsets = round_minimum(exact, scales, spec.minimum_below, spec.scales_dtype)
    elif change is not None:
        # added in float64 and rounded in one pass
        rounded = torch.empty_like(offsets, dtype=spec.offsets_dtype)
        offsets = torch.add(offsets, change, out=rounded)
    return scales, offsets.to(spec.offsets_dtype).to(dtypes[1])


def round_minimum(
    offsets: torch.Tensor, scales: torch.Tensor, steps: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return offsets such that `dtype` holds the weight `steps` scales below: that at code 0.

    It is called the minimum, as in GGUF; with a negative scale it is the largest weight.

    The minimum is rounded, and that plus steps * scale returned. Rounding again changes nothing.
    With fp16 minima and scales the returned fp32 number is exact, unless a group's weights are all
    the same to 2^-12 of themselves: then steps * scale has bits that fp32 drops.

    Args:
        offsets: [G, N].
        scales: [G, N], of any sign.
        steps: `QuantSpec.minimum_below`, a power of two.
        dtype: of the minimum.

    Returns:
        [G, N] in fp32, or fp64 where `scales` are.
    """
    return _above(_minimum(offsets, scales, steps, dtype), scales, steps)


def _minimum(
    offsets: torch.Tensor, scales: torch.Tensor, steps: int, dtype: torch.dtype
) -> torch.Tensor:
    scales = scales.to(wide(scales.dtype))
    minimum = torch.empty_like(scales, dtype=dtype)
    return torch.sub(offsets, scales, alpha=steps, out=minimum)


def _above(minimum: torch.Tensor, scales: torch.Tensor, steps: int) -> torch.Tensor:
    return minimum.to(wide(scales.dtype), copy=True).add_(scales, alpha=steps)


def store_offsets(offsets: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return what a checkpoint holds as `offsets`, [G, N] in `spec.stored_dtype`.

    These are the offsets, or with offsets_at "minimum" the minima, each `spec.mid` scales below.

    Args:
        offsets: [G, N], rounded as `spec` says (`round_minimum`, `fold`).
        scales: [G, N].
        spec: the layer's grid.
    """
    if spec.minimum_below is None:
        return offsets.to(spec.stored_dtype)
    return _minimum(offsets, scales, spec.minimum_below, spec.stored_dtype)


def load_offsets(stored: torch.Tensor, scales: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Return the offsets, [G, N] in `spec.offsets_dtype`, of what `store_offsets` made.

    They come back bit for bit. Of a minimum from elsewhere that is less than 2^-12 of mid * scale
    fp32 drops the last bits, once: storing and loading again keeps the rest.
    """
    if spec.minimum_below is None:
        return stored.to(spec.offsets_dtype)
    return _above(stored, scales, spec.minimum_below).to(spec.offsets_dtype)
