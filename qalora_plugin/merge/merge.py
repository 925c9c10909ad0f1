"""Merge an adapter into its quantized base: integers stay, offsets (and scales) change.

Works on files alone, a few layers in memory at a time. What is folded in is what the training
forward computed, since both call `qalora_kernels.fold`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.source import sealed_base
from ..files.atomic import AtomicDirectory
from ..files.json import read_json, write_json
from ..files.names import CONFIG_FILE
from ..files.writer import bound_to, cores_left, write_weights
from .inherit import inherit
from .plan import start_plan


@dataclass(frozen=True)
class MergeResult:
    """The result of `merge_adapter`.

    Args:
        out: the merged directory.
        layers: number of adapted layers.
        convention: how the adapter pooled: "sum", "mean" or "peft".
        replaced: whole tensors that came from the adapter (see `modules_to_save`).
    """

    out: Path
    layers: int
    convention: str
    replaced: list[str]


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    convention: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> MergeResult:
    """Merge an adapter into its base and write the merged checkpoint.

    Args:
        adapter: directory with adapter_config.json and adapter_model.safetensors, or a Hub id.
        out: directory to make; it must not exist, or be empty.
        base: the quantized base, ours or stock GPTQ; by default what the adapter's config names.
        convention: how the adapter pooled. "auto" takes it from the adapter's config; for one
            that does not say: "mean" (the QA-LoRA authors' code), "peft" (PEFT's use_qalora) or
            "sum" (the paper, arXiv 2309.14717, Algorithm 1).
        progress: called with (tensors written, tensors in all).
        finish: called with the directory, in which everything but the weights is written: it may
            change config.json, which is then bound to the weights, and other files.

    Raises:
        OutputError: the target is not empty, or cannot be written.
        AdapterError: the adapter is damaged, incomplete, of another base, or cannot be merged.
        CheckpointError: the base is damaged or not quantized.
    """
    target = AtomicDirectory(out)  # checks it before the long reading
    with cores_left():
        plan, hashes = start_plan(adapter, base, convention)
    # in this order: an exception waits for the hashes, which may explain it
    with target as partial, _joined(hashes):
        inherit(plan.base, plan.adapter.directory, partial)
        quantization = plan.config["quantization_config"] | {"base": sealed_base(plan.base)}
        write_json(partial / CONFIG_FILE, plan.config | {"quantization_config": quantization})
        if finish is not None:
            finish(partial)
        config = read_json(partial / CONFIG_FILE)
        (partial / CONFIG_FILE).unlink()  # what a kill leaves must not look like a model
        write_weights(
            partial,
            plan.tensors,
            plan.copied,
            plan.written_layer,
            metadata=bound_to(config),
            progress=progress,
        )
        write_json(partial / CONFIG_FILE, config)
    replaced = sorted(plan.dense.from_adapter)
    return MergeResult(target.target, len(plan.layers), plan.convention, replaced)


@contextmanager
def _joined(hashes: Future[bool]) -> Iterator[None]:
    try:
        yield
    finally:
        hashes.result()
