"""Read a stock GPTQ directory's weights back."""

from pathlib import Path

import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..directory import dense_weight
from ..weights import ExportedWeights


class Weights(ExportedWeights):
    """Weights by the GPTQ formula: the runtimes that own the format need other environments."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._checkpoint = open_quantized(exported)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        layer = name.removesuffix(".weight")
        if layer in self._checkpoint.layers:
            return dense_weight(self._checkpoint.layer(layer))
        return self._checkpoint.reader.get(name)
