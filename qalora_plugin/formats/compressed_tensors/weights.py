"""Read a compressed-tensors directory's weights back."""

from pathlib import Path

import torch

from qalora_kernels.packing import unpack_columns

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...files.reader import CheckpointReader
from ..weights import ExportedWeights
from .layout import SCALE, WEIGHT, ZERO_POINT, unpack_zeros


class Weights(ExportedWeights):
    """Weights by the format's formula."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._reader = CheckpointReader(exported)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        layer, reader = name.removesuffix(".weight"), self._reader
        if f"{layer}.{WEIGHT}" not in reader:
            return reader.get(name)
        spec = self.source.layers[layer]
        packed, scales = reader.get(f"{layer}.{WEIGHT}"), reader.get(f"{layer}.{SCALE}").float()
        n, blocks = scales.shape
        bits = 8 if spec.bits == 8 else 4
        codes = unpack_columns(packed, bits, spec.in_features).float()
        zeros = torch.full_like(scales, 1 << bits - 1)
        if f"{layer}.{ZERO_POINT}" in reader:
            zeros = unpack_zeros(reader.get(f"{layer}.{ZERO_POINT}"), bits, n).t().float()
        block = spec.in_features // blocks
        return (codes - zeros.repeat_interleave(block, 1)) * scales.repeat_interleave(block, 1)
