"""The memory of one training step, counted while it runs on tensors without numbers.

The model's own code runs forward and backward under torch's FakeTensorMode: shapes, dtypes and
lifetimes are the real ones, so every architecture and attention is counted as it is written, and
no formula per architecture can go stale.
"""

import weakref
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import convert_to_fp32
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from ..errors import ConfigError
from ..layers.linear import QuantLinear
from .settings import PlanSettings


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a step beside the model's tensors, gradients and optimizer states.

    Args:
        activations: kept for the backward when the blocks are done, before the head.
        workspace: what the peak adds to that: logits and loss, or one block computed again,
            temporary tensors, and the buffer that weights are dequantized into.
    """

    activations: int
    workspace: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages, and their peak, over the operators that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        self.peak = max(self.peak, self.live)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def simulate(model: PeftModel, settings: PlanSettings) -> StepMemory:
    """Run one training step of a model of the meta device, which is used up.

    Gradients exist from the start, as when they are accumulated.

    Raises:
        ConfigError: what the model computes depends on its data (mixture of experts, LayerDrop).
    """
    with FakeTensorMode():
        _make_fake(model)
        model.train()
        if settings.gradient_checkpointing:
            # as transformers and the Trainer do it
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        # transformers cannot look into fake position ids and takes the rows for packed ones, which
        # would need a mask of seq_len squared in every layer
        try:
            with patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
                activations, peak = _run_step(model, settings)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"{type(model.get_base_model()).__name__}: what it computes depends on the data "
                f"({error.func}), as in a mixture of experts or with LayerDrop (OPT): it cannot be "
                "planned from config.json. Measure a run instead"
            ) from error
    return StepMemory(activations, peak - activations + _dequantized_bytes(model, settings))


def _make_fake(model: nn.Module) -> None:
    """Replace tensors of the meta device by fake tensors of the CPU; tied ones stay tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = (tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
        return made[id(tensor)][1]

    model._apply(fake)


def _run_step(model: PeftModel, settings: PlanSettings) -> tuple[int, int]:
    """Run forward and backward; return the bytes kept before the head, and those at the peak."""
    ids = torch.zeros(settings.micro_batch, settings.seq_len, dtype=torch.long)
    counter = _LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.add(tensor)
        if tensor.grad is not None:
            counter.add(tensor.grad)
    static = counter.live
    kept: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda *_: kept.append(counter.live - static))
    with counter:
        loss = _forward(model, ids, settings)
        activations = kept[0] if kept else counter.live - static
        loss.backward()
    return activations, counter.peak - static


def _forward(model: PeftModel, ids: torch.Tensor, settings: PlanSettings) -> torch.Tensor:
    """Return the loss, with the model called as Accelerate does: autocast, outputs in fp32."""
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if settings.dtype == "float32":
        return model(**inputs)["loss"]
    with torch.autocast("cpu", dtype=settings.torch_dtype):
        out = model(**inputs)
    return convert_to_fp32(out)["loss"]


def _dequantized_bytes(model: PeftModel, settings: PlanSettings) -> int:
    """Return the bytes of the one buffer that every quantized layer is dequantized into."""
    sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)]
    return settings.torch_dtype.itemsize * max(sizes, default=0)
