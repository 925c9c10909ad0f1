"""Fit a quantized checkpoint's layers into a model that transformers loads."""

import re
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qalora_kernels import QuantSpec, load_offsets
from qalora_kernels.stored import GUARD

from ..architecture.names import LayerNames
from ..architecture.places import places_problem
from ..architecture.selection import refuse_read_weights
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.validate import check_values
from ..errors import CheckpointError
from ..files.reader import all_finite
from ..layers.absent import is_loaded, mark_loaded
from ..layers.linear import QuantLinear
from .sharded_loading import PendingLayer, load_layers


class StoredLayers:
    """The quantized layers of a checkpoint, on their way into a model.

    Making one replaces the model's linear layers that the checkpoint holds quantized; transformers
    then loads the model; `finish` checks what it loaded and puts in what it could not.
    """

    def __init__(
        self, model: PreTrainedModel, checkpoint: QuantizedCheckpoint, *, pending: bool
    ) -> None:
        """Replace the layers of a model on the meta device.

        With `pending` placeholders go there, which `finish` replaces: for ZeRO-3 and FSDP.

        Raises:
            CheckpointError: the checkpoint belongs to another architecture, or is incomplete.
        """
        stored, stated = checkpoint.weight_names, checkpoint.reader.config.get("architectures")
        problem = places_problem(model, stored, checkpoint.layers.keys(), stated)
        if problem is not None:
            raise CheckpointError(f"{checkpoint.directory}: {problem}.")
        self._checkpoint, self._pending = checkpoint, pending
        self._placed: dict[str, str] = {}  # the checkpoint's name of each layer by the model's
        names = LayerNames(model)
        unexpected: set[str] = set()  # what the files have and the model has not
        missing: set[str] = set()
        for layer, spec in checkpoint.layers.items():
            target = names.parameter(f"{layer}.weight")
            surplus = [GUARD]
            if names.has(target):  # not lm_head, say, for a model class without a head
                name = target.removesuffix(".weight")
                surplus += self._place(model, name, layer, spec)
                self._placed[name] = layer
                if checkpoint.is_foreign and not pending:  # `finish` puts its numbers in
                    missing |= {f"{name}.{part}" for part in checkpoint.packed_parts}
            unexpected |= {names.unknown(f"{layer}.{part}") for part in surplus}
        refuse_read_weights(model, self._placed)
        if not self._placed:
            raise CheckpointError(
                f"{checkpoint.directory}: none of its {len(checkpoint.layers)} quantized layers "
                f"(such as {next(iter(checkpoint.layers))}) is a layer of {type(model).__name__}. "
                "Load it with the model class that it was saved from."
            )
        _ignore(model, "unexpected", unexpected)
        _ignore(model, "missing", missing)
        self._dtypes = {
            name: parameter.dtype
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }

    def _place(self, model: nn.Module, name: str, layer: str, spec: QuantSpec) -> list[str]:
        """Replace one layer; return the parts that its files have and the model has not."""
        checkpoint = self._checkpoint
        linear = _checked_linear(checkpoint, layer, spec, model.get_submodule(name))
        bias, surplus = _match_bias(checkpoint, layer, linear)
        if self._pending or checkpoint.is_foreign:
            surplus += checkpoint.packed_parts
        if self._pending:
            model.set_submodule(name, PendingLayer(spec, bias))
        else:
            quantized = QuantLinear(spec, desc_act=checkpoint.config.desc_act, device="meta")
            quantized.bias, quantized.stored_name = bias, layer
            model.set_submodule(name, quantized)
        return surplus

    def finish(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Check what was loaded into a model of this dtype, and put in what was not.

        Raises:
            CheckpointError: a tensor was not loaded, or holds numbers that no layer can have.
        """
        self._restore_dtypes(model, dtype)
        check_finite(model, str(self._checkpoint.directory))
        if self._pending:
            load_layers(model, self._checkpoint, self._placed)
            return
        for name, layer in self._placed.items():
            self._finish_layer(cast(QuantLinear, model.get_submodule(name)), layer)

    def _restore_dtypes(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        # transformers 5.16 leaves a tensor whose key it renamed in the file's dtype
        kept = model._get_dtype_plan(dtype).values()
        for name, parameter in model.named_parameters():
            wanted = self._dtypes.get(name, parameter.dtype)
            if parameter.dtype != wanted and parameter.dtype not in kept:
                parameter.data = parameter.data.to(wanted)

    def _finish_layer(self, module: QuantLinear, layer: str) -> None:
        checkpoint = self._checkpoint
        if checkpoint.is_foreign:
            module.set_packed(checkpoint.layer(layer))
            mark_loaded(module)
        for part, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not is_loaded(tensor):
                raise CheckpointError(
                    f"{checkpoint.directory}: {layer}.{part} was not loaded. "
                    "Write or copy the checkpoint again, or update qalora-plugin."
                )
        if not checkpoint.is_foreign:
            module.offsets = load_offsets(module.offsets, module.scales, module.spec)
            check_values(f"{checkpoint.directory}: {layer}", module.packed)


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse a loaded model with NaN or infinity in a parameter; quantized layers have checks."""
    for name, parameter in model.named_parameters():
        has_numbers = parameter.is_floating_point() and not parameter.is_meta
        if has_numbers and not all_finite(parameter.detach()):
            raise CheckpointError(
                f"{where}: {name} holds NaN or infinity: the file is damaged, or training "
                "diverged. Copy it again, or use an earlier checkpoint."
            )


def _ignore(model: PreTrainedModel, kind: str, names: set[str]) -> None:
    """Have transformers not report these keys, and no others, as "unexpected" or "missing"."""
    if names:
        attribute = f"_keys_to_ignore_on_load_{kind}"
        exactly = "^(?:" + "|".join(re.escape(name) for name in sorted(names)) + ")$"
        setattr(model, attribute, {*(getattr(model, attribute) or ()), exactly})


def _checked_linear(
    checkpoint: QuantizedCheckpoint, layer: str, spec: QuantSpec, linear: nn.Module
) -> nn.Linear:
    found = type(linear).__name__
    if isinstance(linear, nn.Linear):
        if (linear.in_features, linear.out_features) == (spec.in_features, spec.out_features):
            return linear
        found = f"Linear({linear.in_features}, {linear.out_features})"
    raise CheckpointError(
        f"{checkpoint.where(layer)} is a linear layer with "
        f"{spec.in_features} inputs and {spec.out_features} outputs; config.json's architecture "
        f"has {found} there. config.json belongs to another model."
    )


def _match_bias(
    checkpoint: QuantizedCheckpoint, layer: str, linear: nn.Linear
) -> tuple[nn.Parameter | None, list[str]]:
    """Return the layer's bias, and ["bias"] if the file has an all-zero one that nobody wants."""
    stored = f"{layer}.bias" in checkpoint.reader
    if stored == (linear.bias is not None):
        return linear.bias, []
    if not stored:
        raise CheckpointError(
            f"{checkpoint.directory}: {layer}.bias is missing. "
            "The checkpoint is incomplete: write or copy it again."
        )
    bias = checkpoint.reader.get(f"{layer}.bias")
    if not bias.any():  # GPTQ-for-LLaMa and early AutoGPTQ give every layer one
        return None, ["bias"]
    empty = torch.empty(bias.shape, dtype=linear.weight.dtype, device="meta")
    return nn.Parameter(empty), []
