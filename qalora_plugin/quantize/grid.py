"""The n-bit grid with real-valued offsets: what weights are rounded to, and how to fit it.

    w ~ scales * (q - 2^(bits-1)) + offsets        q in [0, 2^bits)

`offsets` is the weight at the middle code, so the zero-point in other formats' terms is
z = 2^(bits-1) - offsets / scales, a real number. With `zero_points` "integer" z is one of
[1, 2^bits - 1]: the values that both stock GPTQ formats hold (v1 stores z - 1, v2 stores z, each in
`bits` unsigned bits); `offsets` is then scales * (2^(bits-1) - z), exact in fp32. With "none" z is
the middle code and offsets are 0: the grid that others call symmetric. With `offsets_at` "minimum"
the weight at code 0 is an fp16 number, and not the offset (see `QuantSpec`).

Weights are handled transposed, [..., g, N]: the g inputs of a group, all outputs side by side.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from qalora_kernels import SCALES_DTYPE, QuantSpec, round_minimum

from ..errors import QuantizationError

MIN_SCALE = 2.0**-24  # the smallest positive fp16
MAX_FP16 = 65504.0
_SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
_REFINEMENTS = 6

ZeroPoints = Literal["real", "integer", "none"]

Fit = tuple[torch.Tensor, torch.Tensor]
"""Scales and offsets, fp32 [..., N], rounded to what a checkpoint stores."""


@dataclass(frozen=True)
class Grid:
    """Width of the codes, what zero-points may be, and which weight fp16 holds."""

    bits: int
    zero_points: ZeroPoints = "real"
    offsets_at: str = "middle"

    @classmethod
    def of(cls, spec: QuantSpec, zero_points: ZeroPoints) -> "Grid":
        """Return the grid of a layer.

        Raises:
            ValueError: fp16 offsets beside integer zero-points would be rounded off the grid.
        """
        if zero_points == "integer" and spec.offsets_dtype.itemsize < 4:
            raise ValueError(f"integer zero-points need fp32 offsets, found {spec.offsets_dtype}")
        return cls(spec.bits, zero_points, spec.offsets_at)

    @property
    def through_zero(self) -> bool:
        """True if some code is the weight 0: a group is then a scale alone, given its codes."""
        return self.zero_points != "real"

    @property
    def mid(self) -> int:
        """The code whose weight is the offset itself."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


def check_weight(weight: torch.Tensor, name: str) -> None:
    """Refuse what no grid with fp16 scales can hold.

    Raises:
        QuantizationError: `weight` is not a matrix, is not finite, or is beyond fp16's range.
    """
    if weight.dim() != 2 or weight.numel() == 0:
        raise QuantizationError(
            f"{name}: expected a weight matrix [out_features, in_features], "
            f"found shape {tuple(weight.shape)}"
        )
    largest = weight.abs().amax().item()
    if not largest < float("inf"):  # NaN fails this comparison too
        bad = int((~weight.isfinite()).sum())
        raise QuantizationError(
            f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; "
            "the model is damaged, download or save it again"
        )
    if largest > MAX_FP16:
        raise QuantizationError(
            f"{name}: the largest weight is {largest:g}, beyond the {MAX_FP16:g} that fp16 scales "
            "and offsets hold; list this layer in modules_to_not_convert"
        )


def round_scales(scales: torch.Tensor) -> torch.Tensor:
    """Round to fp32 values that fp16 holds exactly, never zero and never infinite."""
    return scales.clamp(MIN_SCALE, MAX_FP16).half().float()


def round_offsets(offsets: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round to the nearest offsets that the grid allows beside (rounded) `scales`, fp32."""
    if grid.zero_points == "none":
        return torch.zeros_like(scales)
    if grid.zero_points == "integer":
        zeros = (grid.mid - offsets / scales).round_().clamp_(1, grid.top)
        return scales * (grid.mid - zeros)
    if grid.offsets_at == "minimum":
        lift = scales * grid.mid
        inside = offsets.clamp(lift - MAX_FP16, lift + MAX_FP16)
        return round_minimum(inside, scales, grid.mid, SCALES_DTYPE)
    return offsets.clamp(-MAX_FP16, MAX_FP16).half().float()


def round_codes(
    w: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the nearest centred codes q - mid of `w`, in its dtype; the grid broadcasts."""
    return ((w - offsets) / scales).round_().clamp_(-grid.mid, grid.top - grid.mid)


def fit_range(w: torch.Tensor, grid: Grid, shrink: float = 1.0) -> Fit:
    """Fit scales and offsets that spread the codes from the least to the greatest weight.

    Args:
        w: fp32 [..., g, N].
        grid: what it will be rounded to.
        shrink: the range is first made smaller by this factor, about its centre (about zero where
            codes must reach it); what lies outside is clipped.
    """
    low, high = torch.aminmax(w, dim=-2)
    if grid.through_zero:
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    else:
        centre = (low + high) / 2
        low, high = torch.lerp(centre, low, shrink), torch.lerp(centre, high, shrink)
    raw = (high - low) / grid.top
    if grid.zero_points == "none":  # as many codes below zero as there are, and one less above
        raw = torch.maximum(high / (grid.mid - 1), low / -grid.mid)
    # A constant group would get a scale of nothing: give it one of the size of its weights, so
    # that a later relative change of the scale still moves them, and no offset.
    constant = raw < MIN_SCALE
    scales = round_scales(torch.where(constant, high.abs(), raw))
    middle = (low + high + scales) / 2  # codes reach one step further down than up
    flat = torch.zeros_like(middle)
    if grid.offsets_at == "minimum":  # code 0 or 1 is the weight, whatever its size
        flat = scales * torch.where(high < 0, grid.mid - 1, grid.mid)
    offsets = torch.where(constant, flat, middle)
    return scales, round_offsets(offsets, scales, grid)


def fit_groups(w: torch.Tensor, grid: Grid, importance: torch.Tensor, search: bool = True) -> Fit:
    """Fit scales and offsets with the least weighted squared rounding error.

    Tries several clipped ranges, then alternates rounding and weighted least squares for (scale,
    offset) from the best one; a step is kept only for the groups where it helps.

    Args:
        w: fp32 [..., g, N].
        grid: what it will be rounded to.
        importance: weight of each input's squared error, broadcastable to [..., g, 1].
        search: False returns the plain range fit.
    """
    fit = fit_range(w, grid)
    if not search:
        return fit
    least = _error(w, fit, grid, importance)

    def improve(candidate: Fit) -> bool:
        """Take the candidate for the groups where it is better; say whether there was one."""
        nonlocal fit, least
        error = _error(w, candidate, grid, importance)
        better = error < least
        scales, offsets = (torch.where(better, *pair) for pair in zip(candidate, fit, strict=True))
        fit, least = (scales, offsets), torch.where(better, error, least)
        return bool(better.any())

    for shrink in _SHRINKS:
        improve(fit_range(w, grid, shrink))
    for _ in range(_REFINEMENTS):
        if not improve(_least_squares(w, fit, grid, importance)):
            break
    return fit


def _error(w: torch.Tensor, fit: Fit, grid: Grid, importance: torch.Tensor) -> torch.Tensor:
    """Return the weighted squared error [..., N] of rounding `w`."""
    s, o = (part.unsqueeze(-2) for part in fit)
    codes = round_codes(w, s, o, grid)
    miss = torch.addcmul(o, codes, s).sub_(w)
    return miss.square_().mul_(importance).sum(-2)


def _least_squares(w: torch.Tensor, fit: Fit, grid: Grid, importance: torch.Tensor) -> Fit:
    """Fit (scale, offset) by weighted least squares with the codes as they are, in closed form.

    The old pair stays where the codes do not determine a positive scale.
    """
    scales, offsets = fit
    codes = round_codes(w, scales.unsqueeze(-2), offsets.unsqueeze(-2), grid)
    if grid.through_zero:
        codes = codes + (offsets / scales).unsqueeze(-2)  # q - z: the line goes through zero
        slope = (importance * w * codes).sum(-2) / (importance * codes * codes).sum(-2)
        new_scales = round_scales(torch.where(slope > 0, slope, scales))
        return new_scales, round_offsets(offsets / scales * new_scales, new_scales, grid)
    total = (importance * torch.ones_like(w)).sum(-2)
    mean_c, mean_w = (importance * codes).sum(-2) / total, (importance * w).sum(-2) / total
    centred = codes - mean_c.unsqueeze(-2)
    slope = (importance * centred * w).sum(-2) / (importance * centred * centred).sum(-2)
    new_scales = round_scales(torch.where(slope > 0, slope, scales))  # 0/0 compares false
    new_offsets = torch.where(slope > 0, mean_w - new_scales * mean_c, offsets)
    return new_scales, round_offsets(new_offsets, new_scales, grid)
