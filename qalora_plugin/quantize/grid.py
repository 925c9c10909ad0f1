"""The n-bit grid with real-valued offsets: what weights are rounded to, and how to fit it.

    w ~ scales * (q - 2^(bits-1)) + offsets        q in [0, 2^bits)

`offsets` is the weight at the middle code, so the zero-point in other formats' terms is
z = 2^(bits-1) - offsets / scales, a real number. With `integer_zeros` z is an integer in
[1, 2^bits - 1]: the values that both stock GPTQ formats hold (v1 stores z - 1, v2 stores z, each in
`bits` unsigned bits); `offsets` is then scales * (2^(bits-1) - z), exact in fp32. With `offsets_at`
"minimum" the weight at code 0 is an fp16 number, and not the offset (see `QuantSpec`).

Weights are handled transposed, [..., g, N]: the g inputs of a group, all outputs side by side.
"""

from dataclasses import dataclass

import torch

from qalora_kernels import SCALES_DTYPE, PackedWeight, QuantSpec, round_minimum

from ..errors import QuantizationError

MIN_SCALE = 2.0**-24  # the smallest positive fp16
MAX_FP16 = 65504.0
_SHRINKS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45)
_REFINEMENTS = 6


@dataclass(frozen=True)
class Grid:
    """Width of the codes, whether zero-points are integers, and which weight fp16 holds."""

    bits: int
    integer_zeros: bool = False
    offsets_at: str = "middle"

    @property
    def mid(self) -> int:
        """The code whose weight is the offset itself."""
        return 1 << (self.bits - 1)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


def packed(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    grid: Grid,
    group_size: int,
) -> PackedWeight:
    """Pack a quantized weight matrix.

    Args:
        codes: uint8 [N, K].
        scales: fp32 [G, N], positive, each representable in fp16.
        offsets: fp32 [G, N], each representable in fp16 (any fp32 with integer zero-points, or
            where the minimum is in fp16).
        g_idx: int32 [K], or None where the group of input k is k // group_size.
        grid: what it was rounded to.
        group_size: inputs a group; never -1.
    """
    wide = grid.integer_zeros or grid.offsets_at == "minimum"
    spec = QuantSpec(
        grid.bits,
        group_size,
        in_features=codes.shape[1],
        out_features=codes.shape[0],
        offsets_dtype=torch.float32 if wide else torch.float16,
        offsets_at=grid.offsets_at,
    )
    return PackedWeight.from_codes(codes, scales, offsets, g_idx, spec)


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
    """fp32 values that fp16 holds exactly, never zero and never infinite."""
    return scales.clamp(MIN_SCALE, MAX_FP16).half().float()


def round_offsets(offsets: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest offsets that the grid allows beside (already rounded) `scales`, fp32."""
    if grid.integer_zeros:
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
    """Nearest centred codes q - mid for `w`, in its dtype; scales and offsets broadcast."""
    return ((w - offsets) / scales).round_().clamp_(-grid.mid, grid.top - grid.mid)


def fit_range(
    w: torch.Tensor, grid: Grid, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets that spread the codes from the least to the greatest weight.

    Args:
        w: fp32 [..., g, N].
        shrink: the range is first made smaller by this factor, about its centre (about zero with
            integer zero-points, whose codes must reach it); what lies outside is clipped.

    Returns:
        scales, offsets: fp32 [..., N], rounded to what a checkpoint stores.
    """
    low, high = torch.aminmax(w, dim=-2)
    if grid.integer_zeros:
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    else:
        centre = (low + high) / 2
        low, high = torch.lerp(centre, low, shrink), torch.lerp(centre, high, shrink)
    raw = (high - low) / grid.top
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


def fit_groups(
    w: torch.Tensor, grid: Grid, importance: torch.Tensor, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and offsets with the least weighted squared rounding error.

    Tries several clipped ranges, then alternates rounding and weighted least squares for (scale,
    offset) from the best one; a step is kept only for the groups where it helps.

    Args:
        w: fp32 [..., g, N].
        importance: weight of each input's squared error, broadcastable to [..., g, 1].
        search: False returns the plain range fit.

    Returns:
        scales, offsets: fp32 [..., N], rounded to what a checkpoint stores.
    """
    scales, offsets = fit_range(w, grid)
    if not search:
        return scales, offsets
    best = _error(w, scales, offsets, grid, importance)
    for shrink in _SHRINKS:
        candidate = fit_range(w, grid, shrink)
        error = _error(w, *candidate, grid, importance)
        scales, offsets, best = _better(error < best, candidate, error, (scales, offsets), best)
    for _ in range(_REFINEMENTS):
        candidate = _least_squares(w, scales, offsets, grid, importance)
        error = _error(w, *candidate, grid, importance)
        better = error < best
        if not better.any():
            break
        scales, offsets, best = _better(better, candidate, error, (scales, offsets), best)
    return scales, offsets


def _better(
    better: torch.Tensor,
    candidate: tuple[torch.Tensor, torch.Tensor],
    error: torch.Tensor,
    current: tuple[torch.Tensor, torch.Tensor],
    best: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the candidate where it is better."""
    scales = torch.where(better, candidate[0], current[0])
    offsets = torch.where(better, candidate[1], current[1])
    return scales, offsets, torch.where(better, error, best)


def _error(
    w: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor,
) -> torch.Tensor:
    """Weighted squared error [..., N] of rounding `w`."""
    s, o = scales.unsqueeze(-2), offsets.unsqueeze(-2)
    codes = round_codes(w, s, o, grid)
    miss = torch.addcmul(o, codes, s).sub_(w)
    return miss.square_().mul_(importance).sum(-2)


def _least_squares(
    w: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    grid: Grid,
    importance: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted least squares for (scale, offset) with the codes as they are, closed form.

    The old pair stays where the codes do not determine a positive scale.
    """
    codes = round_codes(w, scales.unsqueeze(-2), offsets.unsqueeze(-2), grid)
    if grid.integer_zeros:
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
