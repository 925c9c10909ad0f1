"""GPTQ (arXiv 2210.17323) onto a grid with real-valued offsets.

The rounding error of a layer on its calibration inputs X [T, K] is sum_n e_n H e_n^T with
H = X^T X and e = W - Q. Factor the damped H = M D M^T, M unit upper triangular; then rounding input
after input to

    Q[:, k] = round(W[:, k] + sum_{j<k} e[:, j] M[j, k])

costs sum_k D[k] * (rounding error of input k)^2. This is GPTQ's update in the form of QuIP's LDLQ
(arXiv 2307.13304, theorem 6: the two give the same integers), and needs one Cholesky factor instead
of GPTQ's two and an inverse. Beyond the paper:

- a group's scale and offset are fitted to what rounding will really see (the updated weights),
  each input weighted by its D[k];
- afterwards groups are refined in turn, none of which can raise the error: each input is rounded
  again, given all others (coordinate descent, as in QuantEase, arXiv 2309.01885); then, with the
  integers fixed, the error is a quadratic in the group's scale and offset: they are refitted by
  closed-form least squares.

Matrices are transposed here, [K, N]: an input's weights to all outputs are contiguous.
"""

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qalora_kernels import PackedWeight, QuantSpec

from ..errors import ConfigError, QuantizationError
from .grid import (
    Grid,
    ZeroPoints,
    check_weight,
    fit_groups,
    round_codes,
    round_offsets,
    round_scales,
)

Ordering = Literal["none", "groups", "act"]
_BLOCK = 128  # inputs whose updates are applied one by one before the next matrix product
_DAMP_GROWTH = 10.0
_DAMP_RETRIES = 5
_ERROR_ROWS = 512

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GPTQSettings:
    """The settings with which one layer is solved.

    Args:
        ordering: in which order inputs are rounded. "none" as they come; "groups" the groups with
            the largest inputs first, and so within each group: groups stay contiguous; "act"
            (act-order, `desc_act`) all inputs by size: groups are scattered, g_idx says how.
        damp: added to the diagonal of H, as a fraction of its mean.
        mse: search clipped ranges for each group instead of taking least to greatest weight.
        sweeps: times that every group is refined after rounding.
    """

    ordering: Ordering = "groups"
    damp: float = 0.01
    mse: bool = True
    sweeps: int = 2

    def __post_init__(self) -> None:
        known = get_args(Ordering)
        if self.ordering not in known:
            raise ConfigError(f"ordering must be one of {known}, found {self.ordering!r}")
        if not 0 < self.damp < 1:
            raise ConfigError(
                f"damp must lie between 0 and 1, found {self.damp}: leave it out for 0.01"
            )
        if self.sweeps < 0:
            raise ConfigError(f"sweeps must be 0 or more, found {self.sweeps}")


class Hessian:
    """Mean of x x^T over calibration tokens, fp32 [K, K]."""

    def __init__(self, in_features: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Add activations [..., K] of any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]

    def mean(self, name: str) -> torch.Tensor:
        """Return H [K, K]; the identity where no token, or nothing but zeros, reached the layer.

        Raises:
            QuantizationError: an activation was NaN or infinite.
        """
        diagonal = self.sum.diagonal()
        if not diagonal.isfinite().all():
            raise QuantizationError(
                f"{name}: its calibration inputs are NaN or infinite. Quantize with "
                "dtype float32; if that does not help, the model itself is damaged"
            )
        if self.tokens == 0 or diagonal.max() == 0:
            log.warning("%s: no calibration token reached it; rounded as if data-free", name)
            return torch.eye(len(diagonal), device=self.sum.device)
        return self.sum / self.tokens


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: QuantSpec,
    *,
    zero_points: ZeroPoints = "real",
    settings: GPTQSettings | None = None,
    name: str = "weight",
) -> PackedWeight:
    """Quantize one layer with the least error on its calibration inputs.

    Args:
        weight: [N, K], any float dtype.
        hessian: mean of x x^T over the calibration inputs, fp32 [K, K].
        spec: the grid, which the result carries.
        zero_points: what they may be (see `grid`).
        settings: ordering, damping, clipping, sweeps.
        name: of the layer, for error messages.

    Returns:
        Scales and offsets in fp32, each a value that the spec's stored dtypes hold.

    Raises:
        QuantizationError: the weight is damaged, or H cannot be factored.
    """
    check_weight(weight, name)
    settings = settings or GPTQSettings()
    grid = Grid.of(spec, zero_points)
    order, bounds = _order(hessian.diagonal(), spec.group_size, settings.ordering)
    h = hessian[order][:, order]
    w = weight.detach().float().t()[order]
    factor, importance = _factor(h, settings.damp, name)
    codes, error, scales, offsets = _round(w, factor, importance, bounds, grid, settings.mse)
    del factor
    state = _State(h, codes, error, scales, offsets, grid)
    for _ in range(settings.sweeps):
        for group, (start, stop) in enumerate(bounds):
            pull = _round_again(state, group, start, stop)
            _refit(state, group, start, stop, pull)

    # back to the order of the inputs
    codes_out = torch.empty_like(codes)
    codes_out[order] = codes
    g_idx = None
    if settings.ordering == "act":
        g_idx = torch.empty_like(order, dtype=torch.int32)
        for group, (start, stop) in enumerate(bounds):
            g_idx[order[start:stop]] = group
    else:
        # row i of scales belongs to the i-th group rounded: put it where that group lies
        place = order[[start for start, _ in bounds]] // spec.group_size
        inverse = torch.argsort(place)
        scales, offsets = scales[inverse], offsets[inverse]
    codes_out = (codes_out + grid.mid).to(torch.uint8).t()
    return PackedWeight.from_codes(codes_out, scales, offsets, g_idx, spec)


def calibrated_error(
    weight: torch.Tensor, quantized: PackedWeight, hessian: torch.Tensor
) -> float | None:
    """Return the relative squared error of the layer's output on its calibration inputs.

    tr(e H e^T) / tr(W H W^T) with e = W - Q, over at most about 512 evenly spaced outputs; None
    where these are all zero, as those of a layer of zeros.
    """
    step = max(1, weight.shape[0] // _ERROR_ROWS)
    w = weight[::step].float()
    e = w - quantized.dequantize(torch.float32).t()[::step]
    error, whole = ((e @ hessian) * e).sum().item(), ((w @ hessian) * w).sum().item()
    return error / whole if whole > 0 else None


def _order(
    diagonal: torch.Tensor, group_size: int, ordering: Ordering
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Find the order in which inputs are rounded, and each group's place in it."""
    k = diagonal.numel()
    bounds = [(start, min(start + group_size, k)) for start in range(0, k, group_size)]
    if ordering == "none":
        return torch.arange(k, device=diagonal.device), bounds
    if ordering == "act":
        return torch.argsort(diagonal, descending=True, stable=True), bounds
    means = torch.stack([diagonal[start:stop].mean() for start, stop in bounds])
    parts, new_bounds, done = [], [], 0
    for group in torch.argsort(means, descending=True, stable=True).tolist():
        start, stop = bounds[group]
        parts.append(start + torch.argsort(diagonal[start:stop], descending=True, stable=True))
        new_bounds.append((done, done + stop - start))
        done += stop - start
    return torch.cat(parts), new_bounds


def _factor(h: torch.Tensor, damp: float, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Damp `h` in place and factor it, H = M D M^T, M unit upper triangular: M [K, K] and D [K]."""
    mean = h.diagonal().mean()
    added = 0.0
    for _ in range(_DAMP_RETRIES):
        h.diagonal().add_(mean * (damp - added))
        added = damp
        # the lower factor of the reversed matrix, reversed again, is the upper factor
        lower, info = torch.linalg.cholesky_ex(h.flip(0, 1))
        if info == 0 and lower.diagonal().isfinite().all():
            upper = lower.flip(0, 1)
            del lower
            root = upper.diagonal().clone()
            return upper.div_(root), root.square()
        damp *= _DAMP_GROWTH
    raise QuantizationError(
        f"{name}: the second moment of its calibration inputs cannot be factored, even with "
        f"{added:g} of its mean diagonal added. Calibrate on more, or more varied, text"
    )


def _round(
    w: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor,
    bounds: list[tuple[int, int]],
    grid: Grid,
    mse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round input after input: centred codes, error W - Q [K, N], scales and offsets [G, N]."""
    n = w.shape[1]
    codes, error = torch.empty_like(w), torch.zeros_like(w)
    scales, offsets = w.new_empty(len(bounds), n), w.new_empty(len(bounds), n)
    for first, last in _spans(bounds):
        start, stop = bounds[first][0], bounds[last - 1][1]
        target = w[start:stop] + factor[:start, start:stop].t() @ error[:start]
        group = first - 1
        for block in range(start, stop, _BLOCK):
            end = min(block + _BLOCK, stop)
            if block > start:  # only inside a group that is longer than a block
                within = factor[start:block, block:end].t() @ error[start:block]
                target[block - start : end - start] += within
            for i in range(block, end):
                if group + 1 < last and i == bounds[group + 1][0]:
                    group += 1
                    here = slice(i - start, bounds[group][1] - start)
                    weights = importance[i : bounds[group][1], None]
                    fitted = fit_groups(target[here], grid, weights, mse)
                    scales[group], offsets[group] = fitted
                s, o = scales[group], offsets[group]
                codes[i] = round_codes(target[i - start], s, o, grid)
                error[i] = w[i] - torch.addcmul(o, codes[i], s)
                target[i - start + 1 : end - start].addr_(factor[i, i + 1 : end], error[i])
    return codes, error, scales, offsets


def _spans(bounds: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut the groups into runs [first, last) of about `_BLOCK` inputs, at least one group each."""
    spans, first = [], 0
    for last in range(1, len(bounds) + 1):
        if last == len(bounds) or bounds[last][1] - bounds[first][0] > _BLOCK:
            spans.append((first, last))
            first = last
    return spans


@dataclass
class _State:
    """State of the sweeps: damped H [K, K], codes, error W - Q [K, N], scales, offsets [G, N]."""

    h: torch.Tensor
    codes: torch.Tensor
    error: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    grid: Grid


def _round_again(state: _State, group: int, start: int, stop: int) -> torch.Tensor:
    """Round each input of a group anew, all others fixed.

    The error is least where input k moves by (H e)_k / H_kk; the nearest code to that is taken.

    Returns:
        (H e)_g [g, N] after the last change.
    """
    h, codes, error = state.h, state.codes, state.error
    s, o = state.scales[group], state.offsets[group]
    for block in range(start, stop, _BLOCK):
        end = min(block + _BLOCK, stop)
        pull = h[block:end] @ error
        for i in range(block, end):
            wanted = torch.addcmul(o, codes[i], s).add_(pull[i - block], alpha=1 / h[i, i].item())
            new = round_codes(wanted, s, o, state.grid)
            step = (new - codes[i]).mul_(s)
            codes[i] = new
            error[i] -= step
            pull.addr_(h[block:end, i], step, alpha=-1)
    return pull if stop - start <= _BLOCK else h[start:stop] @ error


def _refit(state: _State, group: int, start: int, stop: int, pull: torch.Tensor) -> None:
    """Refit one group's scale and offset by least squares in the metric H, codes fixed.

    With the group's basis B = [c, 1] (codes c [g], ones) the best step (ds, do) solves
    (B^T H_gg B) (ds, do) = B^T (H e)_g, where `pull` is (H e)_g. It is rounded to what a
    checkpoint stores, and taken only where it still lowers the error.
    """
    grid, c, h_gg = state.grid, state.codes[start:stop], state.h[start:stop, start:stop]
    s, o = state.scales[group], state.offsets[group]
    if grid.through_zero:
        c = c + o / s  # q - z: the offset follows the scale
    hc = h_gg @ c
    b_c, a_cc = (c * pull).sum(0), (c * hc).sum(0)
    if grid.through_zero:
        new_s = round_scales(torch.where(a_cc > 0, s + b_c / a_cc, s))
        step = new_s - s
        gain = step * (2 * b_c - step * a_cc)
        new_o = o / s * new_s
        moved = c * step
    else:
        row_sums = h_gg.sum(1)
        b_o, a_co, a_oo = pull.sum(0), row_sums @ c, row_sums.sum()
        det = a_cc * a_oo - a_co * a_co
        new_s = round_scales(torch.where(det > 0, s + (a_oo * b_c - a_co * b_o) / det, s))
        step = new_s - s
        # the best offset beside the scale as rounded
        new_o = round_offsets(o + (b_o - a_co * step) / a_oo, new_s, grid)
        shift = new_o - o
        gain = 2 * (step * b_c + shift * b_o)
        gain -= step * step * a_cc + 2 * step * shift * a_co + shift * shift * a_oo
        moved = torch.addcmul(shift, c, step)
    keep = gain > 0
    state.scales[group] = torch.where(keep, new_s, s)
    state.offsets[group] = torch.where(keep, new_o, o)
    state.error[start:stop] -= torch.where(keep, moved, torch.zeros_like(moved))
