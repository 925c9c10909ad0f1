"""`TrainedGrid`: a quantized layer whose scales and offsets are trained, rounded as stored.

Changes are in quantization steps: with scales s and offsets o from before,

    scales  = s * (1 + stretch)        offsets = o + s * shift        stretch, shift: fp32 [G, N]

so that one learning rate fits layers of any size and width.
"""

from typing import Any

import torch
from torch import nn

from qalora_kernels import LowRank, PackedWeight, grid_linear

from ..layers.linear import QuantLinear
from .grid import Grid, ZeroPoints, round_offsets, round_scales


class _StraightThrough(torch.autograd.Function):
    """Return the rounded numbers; the gradient goes to the exact ones."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class TrainedGrid(QuantLinear):
    """A quantized layer whose `stretch` and `shift` are trained, fp32 [G, N] from zero on.

    Where zero-points are no real numbers there is no shift: the offsets follow the scales.
    """

    stretch: nn.Parameter
    shift: nn.Parameter | None

    def start(self, zero_points: ZeroPoints) -> None:
        """Make the parameters, once the layer's numbers are there."""
        self._grid = Grid.of(self.spec, zero_points)
        zeros = torch.zeros_like(self.scales, dtype=torch.float32)
        self.stretch = nn.Parameter(zeros)
        self.shift = None if self._grid.through_zero else nn.Parameter(zeros.clone())

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and offsets, fp32 [G, N], rounded as a checkpoint stores them."""
        before, offsets = self.scales.float(), self.offsets.float()
        exact = before * (1 + self.stretch)
        scales = _StraightThrough.apply(exact, round_scales(exact.detach()))
        if self.shift is None:
            offsets = scales * (offsets / before)
        else:
            offsets = offsets + before * self.shift
        rounded = round_offsets(offsets.detach(), scales.detach(), self._grid)
        return scales, _StraightThrough.apply(offsets, rounded)

    def _linear(
        self, x: torch.Tensor, weight: PackedWeight, zeros: LowRank | None, scale: LowRank | None
    ) -> torch.Tensor:
        return grid_linear(x, weight, *self.grid(), self.bias)
