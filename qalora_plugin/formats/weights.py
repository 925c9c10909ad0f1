"""Read exported weights back with the library of the runtime that they are for.

Each format's folder has a module `weights` with a class `Weights` that derives from
`ExportedWeights`; `verify` compares what it gives with the model that was exported.
"""

from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight
from qalora_kernels.groups import expand

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.config import QALoRAQuantConfig
from ..hf.load import load_model

_FP32 = 2.0**-22  # of the largest number that is rounded


def load_exact(source: QuantizedCheckpoint) -> torch.nn.Module:
    """Load a quantized model in fp32, whether it is stored in our format or in a foreign one."""
    options: dict[str, Any] = {}
    if source.is_foreign:
        own = QALoRAQuantConfig(source.config.bits, source.config.group_size)
        options["quantization_config"] = own
    return load_model(source.directory, **options)


class ExactWeight:
    """A quantized layer by the formula W = scales * (q - mid) + offsets in float64: the oracle.

    Attributes:
        spec: the layer's grid.
        values: W [N, K].
        steps: [N, K], the scale of each weight.
        offsets: [N, K], likewise.
    """

    def __init__(self, weight: PackedWeight) -> None:
        """Compute them."""
        self.spec = spec = weight.spec
        self.steps, self.offsets = (
            expand(values, weight.g_idx, spec.group_size, spec.in_features).t().double()
            for values in (weight.scales, weight.offsets)
        )
        self.values = (weight.codes().double() - spec.mid) * self.steps + self.offsets


class ExportedWeights:
    """The tensors of an export, by the names that they have in the exported model."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        """Open an export, a directory or file, of the model `source`."""
        self.exported, self.source = exported, source

    def get(self, name: str) -> torch.Tensor | None:
        """Return a layer's `weight` W [N, K] dequantized, or another tensor as it is stored.

        None stands for a tensor that the export holds together with others.
        """
        raise NotImplementedError

    def kind(self, name: str) -> str | None:
        """Return the format's type of a tensor, None if the format has one type alone."""
        return None

    def rounding(self, name: str, exact: ExactWeight) -> torch.Tensor:
        """Return by how much the weights [N, K] `name` may differ: by default as fp32 rounds."""
        return _FP32 * (exact.offsets.abs() + exact.steps * 2**exact.spec.bits)
