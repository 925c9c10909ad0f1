"""Read a torchao directory's weights back with torchao."""

import json
from pathlib import Path

import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...files.reader import CheckpointReader
from ..weights import ExportedWeights
from . import FORMAT


class Weights(ExportedWeights):
    """Weights by torchao's `dequantize`."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        FORMAT.library("torchao")
        self._reader = CheckpointReader(exported)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        reader = self._reader
        if name in reader:
            return reader.get(name)
        start = name.removesuffix(".weight") + "._weight_"
        parts = {key: reader.get(key) for key in reader.tensors if key.startswith(start)}
        try:
            metadata = {"tensor_names": json.dumps([name]), name: reader.metadata[name]}
            return unflatten_tensor_state_dict(parts, metadata)[0][name].dequantize()
        except KeyError as error:
            raise self.missing(name, error) from error
