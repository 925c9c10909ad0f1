"""A 16-bit model on disk as an empty model and its tensors: built on meta, filled part by part."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qalora_kernels import QuantSpec
from qalora_kernels.stored import is_excluded

from ..architecture.blocks import find_blocks
from ..architecture.model import empty_model, read_hf_config
from ..architecture.names import LayerNames
from ..architecture.places import places_problem
from ..architecture.selection import check_group_sizes, check_overrides, linears_to_quantize
from ..architecture.unfuse import split_experts, unfuse_experts
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import unread_note
from ..checkpoint.kind import find_kind
from ..checkpoint.layout import quantized_layers
from ..errors import CheckpointError, ConfigError
from ..files.names import CONFIG_FILE
from ..files.reader import CheckpointReader


class ModelSource:
    """A model directory, its module tree without weights, and where each weight is stored.

    Attributes:
        reader: the directory's tensors.
        model: the architecture that config.json names, in eval mode, parameters on meta.
        block_names: the names of the model's blocks; `blocks` are the modules.
        stored: the stored tensor's name for every parameter and buffer of the model that has one.
        dtype: of what is filled in and computed, by default the model's; `device` is where.
    """

    def __init__(
        self,
        directory: Path,
        trust_remote_code: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        kept: Iterable[str] = (),
    ) -> None:
        """Read config.json and the headers; no tensor is read.

        `kept` names what is not to be quantized, as `modules_to_not_convert` does: experts that
        the files hold fused stay so where it names all of them.

        Raises:
            CheckpointError: of no class of transformers, already quantized, damaged, or without
                some of the model's weights.
            ConfigError: an architecture that cannot be quantized block by block.
        """
        kind = find_kind(directory)
        if directory.is_file():
            raise CheckpointError(
                f"{directory}: expected the directory of a 16-bit model, found a file in format "
                f"{kind.format.name if kind.format else 'unknown'}. Take it as a base as it is, "
                "`qalora import FILE --out DIR`, or give the 16-bit model that it was made from"
            )
        self.reader = CheckpointReader(directory)
        self._kept = tuple(kept)
        if not kind.is_16_bit or quantized_layers(self.reader.tensors):
            raise CheckpointError(
                f"{directory}: is quantized already ({kind.method or 'unknown method'}"
                f"{unread_note(kind.method)}). Quantize "
                "the 16-bit model that it came from"
            )
        self._trust_remote_code = trust_remote_code
        self.model = self.empty_copy()
        prefix, self.blocks = find_blocks(self.model)
        self.block_names = [f"{prefix}.{index}" for index in range(len(self.blocks))]
        self.device = torch.device(device)
        # few CPU operators exist in fp16, none is fast
        slow = self.model.dtype == torch.float16 and self.device.type == "cpu"
        self.dtype = dtype or (torch.float32 if slow else self.model.dtype)
        self.stored = LayerNames(self.model).stored(self.reader.tensors)
        self._check_complete()

    def empty_copy(self) -> transformers.PreTrainedModel:
        """Return another model of the same architecture, parameters on meta."""
        reader = self.reader
        model = _empty_model(reader.directory, reader.config, self._trust_remote_code)
        reader.tensors = split_experts(
            model, reader.tensors, lambda layer: not is_excluded(layer, self._kept)
        )
        unfuse_experts(model, reader.tensors)
        return model

    def _check_complete(self) -> None:
        names = LayerNames(self.model)
        for name in self.reader.tensors:
            if names.places(name).is_converted:
                raise ConfigError(
                    f"{self.reader.directory}: {name} is stored in another form than "
                    f"{type(self.model).__name__} computes with (fused experts); such models "
                    "cannot be quantized yet"
                )
        problem = places_problem(
            self.model, self.reader.tensors, architectures=self.reader.config.get("architectures")
        )
        if problem is not None:
            raise CheckpointError(f"{self.reader.directory}: {problem}")
        for name, parameter in self.model.named_parameters():
            info = self.reader.tensors.get(self.stored.get(name, ""))
            if info is not None and info.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{info.file}: {info.name}: expected shape {list(parameter.shape)} as "
                    f"{CONFIG_FILE} says, found {list(info.shape)}"
                )

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter of the model, in its stored dtype, to the device."""
        return self.reader.get(self.stored[name]).to(self.device)

    def layer_name(self, module: str) -> str:
        """Return the checkpoint's name of a linear module of the model."""
        return self.stored[f"{module}.weight"].removesuffix(".weight")

    def names_in(self, prefix: str) -> list[str]:
        """Return the stored parameters and buffers of the model below the module `prefix`."""
        return [name for name in self.stored if name.startswith(prefix + ".")]

    def fill(self, names: Iterable[str]) -> None:
        """Read these parameters and buffers, and what is tied to them, into the model."""
        for name in names:
            tensor, (owner, leaf) = self.tensor(name), self._owner(name)
            if leaf in owner._parameters:
                self._put(name, tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
            else:
                owner._buffers[leaf] = tensor.to(owner.get_buffer(leaf).dtype)

    def move_buffers(self) -> None:
        """Move the model's buffers, which are not on meta, to the device."""
        for module in self.model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(self.device)

    def empty(self, names: Iterable[str]) -> None:
        """Drop these parameters' numbers again."""
        for name in names:
            owner, leaf = self._owner(name)
            if leaf in owner._parameters:
                self._put(name, torch.empty_like(owner.get_parameter(leaf), device="meta"))

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        parameter = nn.Parameter(tensor, requires_grad=False)
        tied = self.model.all_tied_weights_keys.items()
        for place in (name, *(copy for copy, original in tied if original == name)):
            owner, leaf = self._owner(place)
            owner._parameters[leaf] = parameter

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        module, _, leaf = name.rpartition(".")
        return self.model.get_submodule(module), leaf


def choose_layers(source: ModelSource, config: QALoRAQuantConfig) -> dict[str, QuantSpec]:
    """Return the grid of every layer to quantize, by its name in the model.

    Raises:
        ConfigError: no layer, a group size that is larger than every layer, or an override that
            matches none.
    """
    excluded, stored = config.modules_to_not_convert, source.reader.tensors
    inside = tuple(f"{name}." for name in source.block_names)
    linears = linears_to_quantize(source.model, excluded, stored).items()
    chosen = {name: linear for name, linear in linears if name.startswith(inside)}
    check_group_sizes(config.group_sizes, chosen.values())
    check_overrides(config.dynamic, map(source.layer_name, chosen))
    return {
        name: config.spec_for(source.layer_name(name), linear.in_features, linear.out_features)
        for name, linear in chosen.items()
    }


def _empty_model(
    directory: Path, raw: dict[str, Any], trust_remote_code: bool
) -> transformers.PreTrainedModel:
    config = read_hf_config(directory, trust_remote_code=trust_remote_code)
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
