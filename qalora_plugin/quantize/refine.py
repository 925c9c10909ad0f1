"""Refine a quantized model: train all scales and offsets against the 16-bit model, integers frozen.

The loss is the KL divergence of the quantized model's next-token distributions from those of the
16-bit model on calibration text, back-propagated end to end: the second phase of EfficientQAT
(arXiv 2407.11062, E2E-QP) with the 16-bit model in place of labels. Every forward rounds scales and
offsets to what a checkpoint stores, so what is trained is what is written.

What is trained are changes in quantization steps, see `trained_grid`.
"""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora_kernels import PackedWeight

from ..errors import ConfigError, QuantizationError
from ..files.names import REFINE_STATE_FILE
from ..files.progress import progress_meter
from ..files.reader import CheckpointReader
from ..files.writer import ShardWriter
from .divergence import divergence
from .grid import ZeroPoints
from .source import ModelSource
from .trained_grid import TrainedGrid

HELD_OUT = 8
"""Windows that are kept for the divergence before and after; fewer of a short text."""

_BETAS = (0.9, 0.95)
_SAVE_SECONDS = 60.0
_MOMENTS = ("exp_avg", "exp_avg_sq")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RefineSettings:
    """How a quantized model is refined.

    Args:
        steps: optimizer steps.
        rate: peak learning rate, in quantization steps an optimizer step.
        batch: calibration windows in one step.
        norms: whether the weights of normalization layers are trained too.
    """

    steps: int = 250
    rate: float = 0.002
    batch: int = 1
    norms: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(
                "refine_steps and refine_batch must be 1 or more, found "
                f"{self.steps} and {self.batch}"
            )
        if not 0 < self.rate < 1:
            raise ConfigError(
                f"refine_rate must lie between 0 and 1, found {self.rate}: leave it out for "
                f"{RefineSettings.rate}"
            )

    def windows(self, samples: int) -> int:
        """Return the calibration windows to draw, where GPTQ takes `samples` of them."""
        return max(samples, self.steps * self.batch) + HELD_OUT


def split_windows(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split token windows [samples, seq_len] into those to train on and those held out.

    Raises:
        QuantizationError: the text is too short to hold any out.
    """
    held = min(HELD_OUT, len(windows) // 4)
    if not held:
        raise QuantizationError(
            f"calibration: refining holds a quarter of the text out, at most {HELD_OUT} windows; "
            f"expected 4 windows or more, found {len(windows)}. Give more text, or a smaller "
            "seq_len"
        )
    return windows[:-held], windows[-held:]


class Refiner:
    """One quantized model in training; `run` trains, `packed` and `norms` are the result.

    In memory are the 16-bit model (2 bytes a weight; embeddings, norms and heads are shared), the
    packed integers, and 18 bytes for each of the scales and offsets: the stored value, the change,
    its gradient, and Adam's two moments.

    Args:
        source: the 16-bit model, which is read whole.
        quantized: its quantized layers, by their names in the model.
        settings: of the training.
        zero_points: what they may be; they are trained where they are real numbers.
    """

    def __init__(
        self,
        source: ModelSource,
        quantized: Iterator[tuple[str, PackedWeight]],
        settings: RefineSettings,
        zero_points: ZeroPoints,
    ) -> None:
        """Read the teacher and build the student."""
        self._settings, self._device = settings, source.device
        self._teacher, student = source.model, source.empty_copy()
        source.fill(source.stored)
        source.move_buffers()
        self.layers: dict[str, TrainedGrid] = {}
        for name, weight in quantized:
            linear = self._teacher.get_submodule(name)
            layer = TrainedGrid.from_packed(weight, linear.bias)  # type: ignore[arg-type]
            layer.weight_dtype = source.dtype
            layer.to(self._device).start(zero_points)
            student.set_submodule(name, layer)
            self.layers[name] = layer
        self.norms: dict[str, nn.Parameter] = {}
        self._share(student)
        self._student = student.eval()
        self._masters = {name: norm.detach().float().clone() for name, norm in self.norms.items()}
        self._step = 0
        self._before: float | None = None

    def _share(self, student: nn.Module) -> None:
        """Give the student the teacher's parameters, or trained copies of norms."""
        parts = dict(student.named_modules(remove_duplicate=False))
        for name, parameter in self._teacher.named_parameters(remove_duplicate=False):
            module, _, leaf = name.rpartition(".")
            owner = parts[module]
            if module in self.layers or leaf not in owner._parameters:
                continue
            if self._settings.norms and "norm" in type(owner).__name__.lower():
                parameter = self.norms[name] = nn.Parameter(parameter.detach().clone())
            owner._parameters[leaf] = parameter
        for name, buffer in self._teacher.named_buffers():
            module, _, leaf = name.rpartition(".")
            parts[module]._buffers[leaf] = buffer

    def _trained(self) -> dict[str, torch.Tensor]:
        """Return what the optimizer changes, all fp32."""
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            found[f"{name}.stretch"] = layer.stretch
            if layer.shift is not None:
                found[f"{name}.shift"] = layer.shift
        return found | self._masters

    def _groups(self) -> list[dict[str, Any]]:
        """Return parameter groups, each with its peak rate."""
        groups: list[dict[str, Any]] = []
        for layer in self.layers.values():
            # the outermost code moves as far as the offset does
            groups.append({"params": [layer.stretch], "peak": 1 / layer.spec.mid})
            if layer.shift is not None:
                groups.append({"params": [layer.shift], "peak": 1.0})
        for master in self._masters.values():
            groups.append({"params": [master], "peak": master.abs().mean().item() / 4})
        for group in groups:
            group["peak"] *= self._settings.rate
        return groups

    @property
    def held_bytes(self) -> int:
        """Bytes that are held whatever the batch: both models, changes, gradients, moments."""
        models = (self._teacher, self._student)
        tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
        tensors += self._masters.values()
        once = {id(tensor): tensor.nbytes for tensor in tensors}
        return sum(once.values()) + 3 * sum(t.nbytes for t in self._trained().values())

    def heldout(self, windows: torch.Tensor) -> float:
        """Return the mean divergence over token windows [samples, seq_len]."""
        with torch.no_grad():
            parts = [
                divergence(self._student, self._teacher, part.to(self._device)).item() * len(part)
                for part in windows.split(self._settings.batch)
            ]
        return sum(parts) / len(windows)

    def run(
        self, windows: torch.Tensor, seed: int, directory: Path, *, progress: bool
    ) -> dict[str, Any]:
        """Train on windows [samples, seq_len], and go on where an earlier run in `directory` was.

        Returns:
            The record of it: settings, and the held-out divergence "before" and "after".
        """
        train, held = split_windows(windows)
        settings, trained, groups = self._settings, self._trained(), self._groups()
        optimizer = torch.optim.Adam(groups, lr=settings.rate, betas=_BETAS)
        self._resume(directory, trained, optimizer)
        if self._before is None:
            self._before = self.heldout(held)
        saved = time.monotonic()
        bar = progress_meter(
            f"refining (held-out KL {self._before:.4f})",
            "step",
            total=settings.steps,
            initial=self._step,
            disable=not progress,
        )
        with bar:
            while self._step < settings.steps:
                ids = train[_batch(self._step, len(train), settings.batch, seed)]
                loss = self._train_step(optimizer, ids.to(self._device))
                bar.update()
                bar.set_postfix(KL=f"{loss:.4f}")
                if time.monotonic() - saved > _SAVE_SECONDS or self._step == settings.steps:
                    self._save(directory, trained, optimizer)
                    saved = time.monotonic()
        after = self.heldout(held)
        log.info("refined: held-out KL %.4f, before %.4f", after, self._before)
        if after > self._before:
            log.warning(
                "refining took the model further from the 16-bit one on text that was held out: "
                "KL %.4f, before %.4f. Lower refine_rate (now %g), give more text, or leave it out",
                *(after, self._before, settings.rate),
            )
        record = {"steps": settings.steps, "rate": settings.rate, "batch": settings.batch}
        return record | {
            "norms": settings.norms,
            "heldout_kl_before": round(self._before, 6),
            "heldout_kl_after": round(after, 6),
        }

    def _train_step(self, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
        """Take one optimizer step and return the divergence before it."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(self._step, self._settings.steps)
        loss = divergence(self._student, self._teacher, ids)
        if not loss.isfinite():
            raise QuantizationError(
                f"refining: the divergence is {loss.item()} at step {self._step}: the model, or "
                "its 16-bit original, computes no finite logits on the calibration text"
            )
        loss.backward()
        for name, norm in self.norms.items():
            assert norm.grad is not None
            self._masters[name].grad = norm.grad.float()
            norm.grad = None
        optimizer.step()
        optimizer.zero_grad()
        self._round_norms()
        self._step += 1
        return loss.item()

    @torch.no_grad()
    def _round_norms(self) -> None:
        for name, norm in self.norms.items():
            norm.copy_(self._masters[name])

    def packed(self) -> Iterator[tuple[str, PackedWeight]]:
        """Yield the refined layers."""
        with torch.no_grad():
            for name, layer in self.layers.items():
                weight = layer.packed
                yield name, PackedWeight(weight.qweight, *layer.grid(), weight.g_idx, weight.spec)

    def _save(
        self, directory: Path, trained: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        tensors = dict(trained)
        for name, tensor in trained.items():
            tensors |= {f"{name}.{key}": optimizer.state[tensor][key] for key in _MOMENTS}
        for name, layer in self.layers.items():  # by then the shards may hold refined ones
            tensors |= {f"{name}.scales": layer.scales, f"{name}.offsets": layer.offsets}
        plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        metadata = {"step": str(self._step), "heldout_kl_before": repr(self._before)}
        state = ShardWriter(directory / REFINE_STATE_FILE, plan, metadata)
        try:
            for name, tensor in tensors.items():
                state.write(name, tensor)
        except BaseException:
            state.abort()
            raise
        state.close()

    @torch.no_grad()
    def _resume(
        self, directory: Path, trained: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        if not (directory / REFINE_STATE_FILE).exists():
            return
        state = CheckpointReader(directory, only=REFINE_STATE_FILE)
        self._step = int(state.metadata["step"])
        self._before = float(state.metadata["heldout_kl_before"])
        for name, layer in self.layers.items():
            layer.scales.copy_(state.get(f"{name}.scales"))
            layer.offsets.copy_(state.get(f"{name}.offsets"))
        for name, tensor in trained.items():
            tensor.copy_(state.get(name))
            moments = {key: state.get(f"{name}.{key}").to(tensor.device) for key in _MOMENTS}
            optimizer.state[tensor] = {"step": torch.tensor(float(self._step)), **moments}
        self._round_norms()


def _batch(step: int, samples: int, batch: int, seed: int) -> torch.Tensor:
    """Return the windows of a step, int64 [<= batch]: each epoch in an order of its own."""
    epoch, place = divmod(step, -(-samples // batch))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=generator)[place * batch : (place + 1) * batch]


def _schedule(step: int, steps: int) -> float:
    """Return the rate over its peak: a tenth of the steps up, then half a cosine down to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
