"""Read an MLX directory's weights back with MLX."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...files.reader import CheckpointReader
from ..stacks import expert_stacks
from ..weights import ExportedWeights
from . import FORMAT
from .write import MLXLayers, check


class Weights(ExportedWeights):
    """Weights by `mlx.core.dequantize`."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._mx: Any = FORMAT.library("mlx.core")
        self._reader = CheckpointReader(exported)
        self._layers = MLXLayers(check(source))
        self._files = {path: self._mx.load(str(path)) for path in self._reader.files}
        self._experts = {
            layer: (self._layers.stack_name(stack), number)
            for stack, members in expert_stacks(source).items()
            for number, layer in enumerate(members)
        }

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor in fp32."""
        own = name.removesuffix(".weight")
        layer, number = self._experts.get(own, (own, None))
        stored = name if number is None else f"{layer}.weight"
        value = self._stored(stored, number)
        if f"{layer}.scales" in self._reader:
            grids = self._reader.config["quantization"]
            grid = grids.get(layer) or grids
            # in fp32, so that nothing is rounded
            scales, biases = (
                self._stored(f"{layer}.{part}", number).astype(self._mx.float32)
                for part in ("scales", "biases")
            )
            sizes = {"group_size": grid["group_size"], "bits": grid["bits"]}
            value = self._mx.dequantize(value, scales, biases, **sizes)
        found = torch.from_numpy(np.array(value.astype(self._mx.float32)))
        if name not in self.source.reader or not self._layers.changes(name):
            return found
        original = self.source.reader.get(name)
        return original if torch.equal(found, self._layers.changed(name, original)) else found

    def _stored(self, key: str, number: int | None = None) -> Any:
        """Return a tensor, or of experts that of one."""
        value = self._files[self._reader.info(key).file][key]
        return value if number is None else value[number]
