"""Read a compressed-tensors directory's weights back."""

from pathlib import Path

import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ..directory import dense_weight
from ..weights import ExportedWeights
from .read import open_checkpoint


class Weights(ExportedWeights):
    """Weights by the format's formula: its library dequantizes in the dtype of the scales."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._checkpoint = open_checkpoint(exported)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        layer = name.removesuffix(".weight")
        if layer in self._checkpoint.layers:
            return dense_weight(self._checkpoint.layer(layer))
        return self._checkpoint.reader.get(name)
