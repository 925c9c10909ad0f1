"""One training step on tensors without numbers, and the memory that it needs.

The model's own code runs forward and backward under torch's FakeTensorMode: shapes, dtypes and
lifetimes are the real ones, so every architecture and attention is counted as it is written, and
no formula per architecture can go stale.
"""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..quant.linear import QuantLinear
from .settings import PlanSettings


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the model's tensors, gradients and optimizer.

    Args:
        activations: kept for the backward when the blocks are done, before the head.
        workspace: what the peak adds to that: logits and loss, or one block computed again, and
            temporaries; with the buffer that weights are dequantized into.
    """

    activations: int
    workspace: int


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive, and their peak, over the operators that run in it."""

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


def _make_fake(model: nn.Module) -> None:
    """Tensors of the meta device become fake tensors of the CPU; tied ones stay tied."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = (tensor, torch.empty(tensor.shape, dtype=tensor.dtype))
        return made[id(tensor)][1]

    model._apply(fake)


def _forward(model: PeftModel, settings: PlanSettings) -> Callable[..., Any]:
    """The model as Accelerate calls it: under autocast, outputs in fp32."""
    if settings.dtype == "float32":
        return model.__call__

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=settings.torch_dtype)

    def call(**inputs: Any) -> Any:
        with autocast():
            return model(**inputs)

    return convert_outputs_to_fp32(call)


def simulate(model: PeftModel, settings: PlanSettings) -> StepMemory:
    """Run one step of a model of the meta device, which is used up.

    Gradients are there from the start, as when they are accumulated.

    Raises:
        ConfigError: the model's path depends on its data (mixture of experts), or it cannot be
            trained on token ids alone.
    """
    name = type(model.get_base_model()).__name__
    with FakeTensorMode():
        _make_fake(model)
        model.train()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(settings.micro_batch, settings.seq_len, dtype=torch.long)
        try:
            step = _step(model, ids, _forward(model, settings))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"{name}: what it computes depends on the data ({error.func}), as in a mixture of "
                "experts: its memory cannot be planned from config.json. Measure a run instead"
            ) from error
    return StepMemory(step.activations, step.workspace + _dequantized(model, settings))


def _step(model: PeftModel, ids: torch.Tensor, forward: Callable[..., Any]) -> StepMemory:
    tracker = _LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.add(tensor)
        if tensor.grad is not None:
            tracker.add(tensor.grad)
    static = tracker.live
    kept: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda *_: kept.append(tracker.live - static))
    with tracker:
        loss = forward(input_ids=ids, labels=ids, use_cache=False)["loss"]
        activations = kept[0] if kept else tracker.live - static
        loss.backward()
    return StepMemory(activations, tracker.peak - static - activations)


def _dequantized(model: PeftModel, settings: PlanSettings) -> int:
    """Bytes of the one buffer that every quantized layer is dequantized into."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return settings.torch_dtype.itemsize * max(
        (layer.in_features * layer.out_features for layer in layers), default=0
    )
