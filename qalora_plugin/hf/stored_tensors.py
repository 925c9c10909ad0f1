"""Let transformers load the dense tensors of a base from our reader instead of from its files.

Files in a foreign format name or store tensors otherwise than the model has them: MLX's quantized
`weight` and `scales` would be taken for the model's own. So the model that is loaded brings what
its state dict is to be, and transformers treats that as it does a file's: names, dtypes, devices.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..files.reader import CheckpointReader
from ..files.safetensors import dtype_code

_ATTRIBUTE = "_qalora_state"
_INSTALLED = "_qalora_original"


class StoredTensor:
    """One tensor of a reader, as safetensors' slices are: read when it is indexed."""

    def __init__(self, reader: CheckpointReader, name: str) -> None:
        self._reader, self._name = reader, name

    def get_dtype(self) -> str:
        """Return the dtype as safetensors names it."""
        return dtype_code(self._reader.info(self._name).dtype)

    def get_shape(self) -> list[int]:
        """Return the shape."""
        return list(self._reader.info(self._name).shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read the tensor, and index it."""
        return self._reader.get(self._name)[index]


def bring_state(model: PreTrainedModel, checkpoint: QuantizedCheckpoint) -> None:
    """Have a model that is loaded take its dense tensors from a reader of the format's own."""
    if type(checkpoint.reader) is not CheckpointReader:
        bring_tensors(model, checkpoint.reader, checkpoint.dense_names)


def bring_tensors(model: PreTrainedModel, reader: CheckpointReader, names: Iterable[str]) -> None:
    """Have a model that is loaded take these tensors from a reader, and none from its files."""
    setattr(model, _ATTRIBUTE, {name: StoredTensor(reader, name) for name in names})


def install() -> None:
    """Wrap `PreTrainedModel._load_pretrained_model`; a second call does nothing."""
    original = PreTrainedModel._load_pretrained_model
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def load(model: PreTrainedModel, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        brought = model.__dict__.pop(_ATTRIBUTE, None)
        return original(model, state_dict if brought is None else brought, *args, **kwargs)

    setattr(load, _INSTALLED, original)
    PreTrainedModel._load_pretrained_model = staticmethod(load)
