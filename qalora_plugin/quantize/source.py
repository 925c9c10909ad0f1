"""A 16-bit model on disk as an empty model and its tensors: built on meta, filled part by part."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from ..architecture.model import empty_model
from ..architecture.names import LayerNames
from ..errors import CheckpointError, ConfigError
from ..files.names import CONFIG_FILE
from ..files.reader import CheckpointReader


class ModelSource:
    """A model directory, its module tree without weights, and where each weight is stored.

    Attributes:
        reader: the directory's tensors.
        model: the architecture that config.json names, in eval mode, parameters on meta.
        stored: the stored tensor's name for every parameter and buffer of the model that has one.
    """

    def __init__(self, directory: Path, trust_remote_code: bool = False) -> None:
        """Read config.json and the headers; no tensor is read.

        Raises:
            CheckpointError: already quantized, damaged, or without some of the model's weights.
            ConfigError: an architecture that cannot be quantized block by block.
        """
        self.reader = CheckpointReader(directory)
        raw = self.reader.config.get("quantization_config")
        if raw is not None or any(name.endswith(".qweight") for name in self.reader.tensors):
            method = raw.get("quant_method") if isinstance(raw, dict) else None
            raise CheckpointError(
                f"{directory}: is quantized already ({method or 'unknown method'}). Quantize the "
                "16-bit model that it came from"
            )
        self.model = _empty_model(directory, self.reader.config, trust_remote_code)
        names = LayerNames(self.model)
        found = {names.parameter(name): name for name in self.reader.tensors}
        self.stored = {name: stored for name, stored in found.items() if names.has(name)}
        self._check_complete()

    def _check_complete(self) -> None:
        tied = self.model.all_tied_weights_keys
        mapping = get_model_conversion_mapping(self.model)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        for name in self.reader.tensors:
            _, pattern = rename_source_key(name, [], converters)
            if pattern is not None:
                raise ConfigError(
                    f"{self.reader.directory}: {name} is stored in another form than "
                    f"{type(self.model).__name__} computes with (fused experts); such models "
                    "cannot be quantized yet"
                )
        lost = [name for name, _ in self.model.named_parameters() if name not in self.stored]
        lost = [name for name in lost if name not in tied]
        if lost:
            raise CheckpointError(
                f"{self.reader.directory}: no tensor for {lost[0]} ({len(lost)} such) of "
                f"{type(self.model).__name__}, which {CONFIG_FILE} names. The checkpoint is "
                "incomplete, or its architecture is another"
            )
        for name, parameter in self.model.named_parameters():
            if name not in self.stored:
                continue
            info = self.reader.info(self.stored[name])
            if info.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{info.file}: {info.name}: expected shape {list(parameter.shape)} as "
                    f"{CONFIG_FILE} says, found {list(info.shape)}"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter of the model as it is stored, read into fresh memory."""
        return self.reader.get(self.stored[name])

    def layer_name(self, module: str) -> str:
        """The checkpoint's name of a linear module of the model."""
        return self.stored[f"{module}.weight"].removesuffix(".weight")

    def names_in(self, prefix: str) -> list[str]:
        """Stored parameters and buffers of the model below the module `prefix`."""
        return [name for name in self.stored if name.startswith(prefix + ".")]

    def fill(self, names: Iterable[str], dtype: torch.dtype, device: torch.device) -> None:
        """Read these parameters and buffers, and what is tied to them, into the model; float
        parameters become `dtype`."""
        for name in names:
            owner_name, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_name)
            tensor = self.tensor(name).to(device)
            if leaf in owner._parameters:
                if tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                self._put(name, nn.Parameter(tensor, requires_grad=False))
            else:
                buffer = owner.get_buffer(leaf)
                owner._buffers[leaf] = tensor.to(buffer.dtype)

    def empty(self, names: Iterable[str]) -> None:
        """Drop these parameters' numbers again."""
        for name in names:
            owner_name, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(owner_name)
            if leaf in owner._parameters:
                meta = torch.empty_like(owner.get_parameter(leaf), device="meta")
                self._put(name, nn.Parameter(meta, requires_grad=False))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        tied = self.model.all_tied_weights_keys.items()
        for place in (name, *(copy for copy, original in tied if original == name)):
            owner_name, _, leaf = place.rpartition(".")
            self.model.get_submodule(owner_name)._parameters[leaf] = parameter


def _empty_model(
    directory: Path, raw: dict[str, Any], trust_remote_code: bool
) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{directory}: encoder-decoder models cannot be quantized block by block; use a "
            "decoder (causal LM) or an encoder"
        )
    names = raw.get("architectures") or [None]
    model = empty_model(config, names[0], trust_remote_code=trust_remote_code)
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False  # a cache would grow with every run of a block
    return model.eval()
