"""One training step on tensors without numbers, and the memory that it needs.

The model's own code runs forward and backward under torch's FakeTensorMode: shapes, dtypes and
lifetimes are the real ones, so every architecture and attention is counted as it is written, and
no formula per architecture can go stale.
"""

import contextlib
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
from ..layers.linear import QuantLinear
from .resident import AllocationLog, log_steps, resident_peak
from .settings import PlanSettings


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside the model's tensors, gradients and optimizer.

    Args:
        activations: kept for the backward when the blocks are done, before the head.
        workspace: what the peak adds to that: logits and loss, or one block computed again, and
            temporaries; with the buffer that weights are dequantized into.
        freed: on the CPU, freed blocks that glibc's malloc keeps resident: what the peak of some
            steps, see `resident`, is above these two, gradients and the optimizer's states.
    """

    activations: int
    workspace: int
    freed: int = 0


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
    """Run one step of a model of the meta device, which is used up, and on the CPU some more.

    Gradients are there from the start, as when they are accumulated.

    Raises:
        ConfigError: the model's path depends on its data (mixture of experts), or it cannot be
            trained on token ids alone.
    """
    name = type(model.get_base_model()).__name__
    with FakeTensorMode():
        _make_fake(model)
        model.train()
        log = AllocationLog([*model.parameters(), *model.buffers()])
        if settings.gradient_checkpointing:
            contexts = {"context_fn": lambda: (contextlib.nullcontext(), log.recomputing())}
            # as transformers and the Trainer do it
            model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
            model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        loss = _loss(model, settings)
        try:
            step = _step(model, loss)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"{name}: what it computes depends on the data ({error.func}), as in a mixture of "
                "experts or with LayerDrop (OPT): it cannot be planned from config.json. Measure a "
                "run instead"
            ) from error
        buffer = _dequantized(model, settings)
        freed = 0
        if settings.device == "cpu":
            for parameter in trained:
                parameter.grad = None
            states = 2 if settings.optimizer == "adamw" else 0
            log_steps(log, loss, trained, buffer, states)
            counted = sum(p.nbytes + 4 * states * p.numel() for p in trained)
            counted += step.activations + step.workspace + buffer
            freed = max(0, resident_peak(log) - counted)
    return StepMemory(step.activations, step.workspace + buffer, freed)


def _loss(model: PeftModel, settings: PlanSettings) -> Callable[[], torch.Tensor]:
    """One forward."""
    forward = _forward(model, settings)
    ids = torch.zeros(settings.micro_batch, settings.seq_len, dtype=torch.long)
    return lambda: forward(input_ids=ids, labels=ids, use_cache=False)["loss"]


def _step(model: PeftModel, loss: Callable[[], torch.Tensor]) -> StepMemory:
    tracker = _LiveBytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        tracker.add(tensor)
        if tensor.grad is not None:
            tracker.add(tensor.grad)
    static = tracker.live
    kept: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    hook = None
    if head is not None:
        hook = head.register_forward_pre_hook(lambda *_: kept.append(tracker.live - static))
    with tracker:
        value = loss()
        activations = kept[0] if kept else tracker.live - static
        value.backward()
    if hook is not None:
        hook.remove()
    return StepMemory(activations, tracker.peak - static - activations)


def _dequantized(model: PeftModel, settings: PlanSettings) -> int:
    """Bytes of the one buffer that every quantized layer is dequantized into."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    return settings.torch_dtype.itemsize * max(
        (layer.in_features * layer.out_features for layer in layers), default=0
    )
