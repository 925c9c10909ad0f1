"""Read exported weights back with the library of the runtime that they are for.

Each format's folder has a module `weights` with a class `Weights` that derives from
`ExportedWeights`; `verify` compares what it gives with the model that was exported.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import torch

from qalora_kernels import PackedWeight, reference
from qalora_kernels.groups import expand

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..errors import VerificationError

_FP32 = 2.0**-22  # of the largest number that is rounded


class ExactWeight:
    """A quantized layer by the formula W = scales * (q - mid) + offsets in float64: the oracle."""

    def __init__(self, weight: PackedWeight) -> None:
        self._weight, self.spec = weight, weight.spec

    @cached_property
    def values(self) -> torch.Tensor:
        """The weights W, float64 [N, K]."""
        return reference.dequantize(self._weight, torch.float64).t()

    @cached_property
    def steps(self) -> torch.Tensor:
        """The size of the scale of each weight, float64 [N, K]; 0 where a group has one weight."""
        return self._of_inputs(self._weight.scales.abs())

    @cached_property
    def offsets(self) -> torch.Tensor:
        """The offset of each weight, float64 [N, K]."""
        return self._of_inputs(self._weight.offsets)

    def _of_inputs(self, per_group: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        each = expand(per_group.double(), self._weight.g_idx, spec.group_size, spec.in_features)
        return each.t()


class ExportedWeights(ABC):
    """The tensors of an export of `source`, by the names that they have in the exported model."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        self.exported, self.source = exported, source

    @abstractmethod
    def get(self, name: str) -> torch.Tensor | None:
        """Return one tensor: a layer's `weight` W [N, K] dequantized, another one as it is stored.

        Returns:
            None of a tensor that the export holds together with others.

        Raises:
            VerificationError, CheckpointError: it is not there.
        """

    def missing(self, name: str, part: object) -> VerificationError:
        """Return the error that says that a tensor, or a part of it in the export, is not there."""
        return VerificationError(
            f"{self.exported}: expected {part} for {name} of {self.source.directory}, found none. "
            "Export again."
        )

    def kind(self, name: str) -> str | None:
        """Return the format's type of a tensor, None if the format has one type alone."""
        return None

    def rounding(self, name: str, exact: ExactWeight) -> torch.Tensor:
        """Return by how much each weight [N, K] of `name` may differ: here as fp32 rounds."""
        return _FP32 * (exact.offsets.abs() + exact.steps * 2**exact.spec.bits)
