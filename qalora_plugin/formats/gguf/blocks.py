"""GGUF's Q4_1 (ggml-common.h, `block_q4_1`), which holds a layer of at most 4 bits.

Blocks of 32 inputs with an f16 scale d and an f16 minimum m, W = d * code + m; byte i of a block
holds the codes of inputs i (low bits) and i + 16. d is our scale, up to its sign; m = offsets - d *
(code of the offset) is rounded to f16, the only rounding where scales are fp16. q may count up or
down and, below 4 bits, start anywhere: each group takes the way whose minimum rounds least. Of a
checkpoint with offsets_at "minimum" m is an f16 number as it is, and nothing is rounded.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from qalora_kernels import PackedWeight

from ...errors import CheckpointError
from ..directory import regroup
from .headers import BLOCK

BLOCK_BYTES = 20  # d, m, 16 bytes of codes
TOP_CODE = 15
WANTED = 2e-3  # of a step: a minimum that rounds by more is counted


class Placement(NamedTuple):
    """The place of q in Q4_1: code = start + sign * q, W = sign * scale * code + minimum.

    Args:
        minimum: m, fp16 [G, N].
        start: the code of q = 0, int8 [G, N].
        sign: 1 or -1, int8 [G, N].
        error: rounding of the minimum in steps, and of a scale that is no f16 number at the highest
            code, float64 [G, N].
    """

    minimum: torch.Tensor
    start: torch.Tensor
    sign: torch.Tensor
    error: torch.Tensor


def least_rounding(weight: PackedWeight) -> Placement:
    """Among all ways to put q into 0..15, upwards or downwards, find the one that rounds least.

    Raises:
        CheckpointError: a minimum or a scale that is out of the range of f16.
    """
    spec = weight.spec
    scales, offsets = weight.scales.double(), weight.offsets.double()
    steps = scales.abs().where(scales != 0, 1.0)  # without one, the minimum is the weight
    top = (1 << spec.bits) - 1
    rounded = TOP_CODE * (scales.half().double() - scales).abs() / steps
    best: Placement | None = None
    for sign in (1, -1):
        for shift in range(TOP_CODE - top + 1):
            start = shift if sign > 0 else top + shift
            exact = offsets - scales * (sign * start + spec.mid)
            minimum = exact.to(torch.float16)
            error = (minimum.double() - exact).abs() / steps + rounded
            code, step = (torch.full_like(minimum, n, dtype=torch.int8) for n in (start, sign))
            found = Placement(minimum, code, step, error)
            if best is not None:
                pairs = zip(found, best, strict=True)
                found = Placement(*(torch.where(error < best.error, *pair) for pair in pairs))
            best = found
    assert best is not None
    if not best.error.isfinite().all():
        raise CheckpointError("a minimum or scale is out of the range of f16, which GGUF stores")
    return best


@dataclass
class Rounding:
    """The rounding of minima, and of scales that f16 does not hold, over all groups, in steps."""

    largest: float = 0.0
    total: float = 0.0
    above: int = 0
    groups: int = 0
    exact_scales: bool = True

    def add(self, weight: PackedWeight) -> None:
        """Count one layer's groups.

        Raises:
            CheckpointError: see `least_rounding`.
        """
        error, scales = least_rounding(weight).error, weight.scales
        self.exact_scales &= torch.equal(scales.half().to(scales), scales)
        self.largest = max(self.largest, error.max().item())
        self.total += error.sum().item()
        self.above += int((error > WANTED).sum())
        self.groups += error.numel()

    def as_text(self) -> str:
        """Return one sentence for people."""
        if self.largest == 0:
            return "Exact: integers, scales and minima, bit for bit."
        kept = "Integers and scales are exact; minima are "
        if not self.exact_scales:
            kept = "Integers are exact; minima and scales are "
        share = 100 * self.above / self.groups
        return (
            f"{kept}rounded to f16: by at most "
            f"{self.largest:.1e} of a step, {self.total / self.groups:.1e} in the mean, "
            f"{share:.1f}% of groups above {WANTED:g}."
        )


def q4_1(weight: PackedWeight) -> torch.Tensor:
    """Return a layer as Q4_1 blocks, uint8 [N, K / 32 * 20]."""
    spec, placed = weight.spec, least_rounding(weight)
    n, blocks = spec.out_features, spec.in_features // BLOCK
    codes = weight.codes().view(torch.int8).view(n, blocks, BLOCK)
    codes = codes * regroup(placed.sign, spec, BLOCK).unsqueeze(2)
    codes += regroup(placed.start, spec, BLOCK).unsqueeze(2)
    halves = codes.view(torch.uint8).view(n, blocks, 2, BLOCK // 2)
    out = torch.empty(n, blocks, BLOCK_BYTES, dtype=torch.uint8)
    scale = (weight.scales * placed.sign).to(torch.float16)
    for at, numbers in ((0, scale), (2, placed.minimum)):
        out[:, :, at : at + 2] = regroup(numbers, spec, BLOCK).view(torch.uint8).view(n, blocks, 2)
    out[:, :, 4:] = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return out.view(n, blocks * BLOCK_BYTES)
