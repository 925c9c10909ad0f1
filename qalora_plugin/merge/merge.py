"""Merge an adapter into its quantized base: integers stay, offsets (and scales) change.

Works on files alone: no model is built, one layer is in memory at a time. What is folded in is
what the training forward computed, since both call `qalora_kernels.fold`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.layout import TensorPlan, layer_plan, pack_layer
from ..checkpoint.side_files import TOKENIZER_FILES, copy_side_files
from ..errors import AdapterError, CheckpointError
from ..files.atomic import AtomicDirectory
from ..files.hub import resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, QUANTIZE_CONFIG_FILE
from ..files.writer import CheckpointWriter, split_plan
from .adapter import Adapter, open_adapter
from .modules_to_save import plan_saved
from .pairing import LayerMerge, pair


@dataclass(frozen=True)
class MergeResult:
    """What `merge_adapter` wrote.

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


@dataclass(frozen=True)
class MergePlan:
    """A merge that has passed every check; nothing is written yet. See `plan_merge`.

    Args:
        adapter: the adapter.
        base: the base.
        convention: "sum", "mean" or "peft".
        layers: the adapted layers.
        tensors: name, dtype and shape of every tensor of the result.
        config: config.json of the result.
        copies: tensors that the base ties and the result does not, {name: name in the base}.
    """

    adapter: Adapter
    base: QuantizedCheckpoint
    convention: str
    layers: dict[str, LayerMerge]
    tensors: TensorPlan
    config: dict[str, Any]
    copies: dict[str, str]

    def merged_layer(self, name: str) -> PackedWeight:
        """One quantized layer of the result; an unadapted one is the base's."""
        tensors = self.base.layer(name)
        if name not in self.layers:
            return tensors
        merged = self.layers[name].fold(self.adapter, tensors)
        for what in ("scales", "offsets"):
            values = getattr(merged, what)
            if not values.isfinite().all() or (what == "scales" and bool((values <= 0).any())):
                raise AdapterError(
                    f"{self.adapter.weights}: {name}: folded in, it takes {what} out of the range "
                    "of their stored dtype. Training diverged: use an earlier checkpoint."
                )
        return merged

    def stored(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one quantized layer as the result stores them."""
        return pack_layer(name, self.merged_layer(name))


def plan_merge(
    adapter: str | Path, base: str | Path | None = None, convention: str = "auto"
) -> MergePlan:
    """Read and check all that a merge needs; see `merge_adapter` for arguments and errors."""
    opened = open_adapter(adapter)
    chosen = opened.convention(convention)
    checkpoint = _open_base(opened, base)
    layers = pair(opened, checkpoint, chosen)
    tensors = checkpoint.plan()
    for name, merge in layers.items():
        tensors.update(layer_plan(name, merge.merged_spec, checkpoint.config.desc_act))
    config = copy.deepcopy(checkpoint.reader.config)
    copies = plan_saved(opened, checkpoint, tensors, config)
    config["quantization_config"] = _merged_config(opened, checkpoint, layers, chosen).to_dict()
    return MergePlan(opened, checkpoint, chosen, layers, tensors, config, copies)


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
        finish: called with the directory, when all is written but it does not have its name yet.

    Raises:
        OutputError: the target is not empty, or cannot be written.
        AdapterError: the adapter is damaged, incomplete, of another base, or cannot be merged.
        CheckpointError: the base is damaged or not quantized.
    """
    target = AtomicDirectory(out)  # checks it before the long reading
    plan = plan_merge(adapter, base, convention)
    with target as partial:
        _write_weights(partial, plan, progress)
        copy_side_files(plan.base.directory, partial)
        if (plan.adapter.directory / "tokenizer_config.json").exists():  # as trained with
            copy_side_files(plan.adapter.directory, partial, TOKENIZER_FILES)
        write_json(partial / CONFIG_FILE, plan.config)
        if finish is not None:
            finish(partial)
    return MergeResult(target.target, len(plan.layers), plan.convention, sorted(plan.adapter.saved))


def _open_base(adapter: Adapter, base: str | Path | None) -> QuantizedCheckpoint:
    where = adapter.directory / ADAPTER_CONFIG_FILE
    found = base or adapter.config.get("base_model_name_or_path")
    if not found:
        raise AdapterError(
            f"{where}: base_model_name_or_path is empty. Name the quantized base with --base."
        )
    try:
        directory = resolve_model_dir(found, None if base else adapter.config.get("revision"))
    except CheckpointError as error:
        if base:
            raise
        raise AdapterError(
            f"{where}: its base_model_name_or_path cannot be opened. {error} If the quantized base "
            "is elsewhere, name it with --base."
        ) from error
    if adapter.is_ours and is_dense(directory):
        grid = (
            f"--bits {adapter.config.get('bits')} --group-size {adapter.config.get('group_size')}"
        )
        raise AdapterError(
            f"{directory}: is a 16-bit model, which was quantized while it was loaded for "
            f"training. Write its integers down first: `qalora quantize {found} --out DIR "
            f"--method rtn {grid}` (and --offsets-at minimum where it was loaded so), then merge "
            f"with --base DIR; the fingerprint in {where} shows whether they are the same. "
            "(MergeCallback takes them from memory.)"
        )
    return open_quantized(directory)


def is_dense(directory: Path) -> bool:
    """Whether a directory holds a model that is not quantized."""
    config = directory / CONFIG_FILE
    return (
        config.exists()
        and not read_json(config).get("quantization_config")
        and not (directory / QUANTIZE_CONFIG_FILE).exists()
    )


def _merged_config(
    adapter: Adapter, base: QuantizedCheckpoint, layers: dict[str, LayerMerge], convention: str
) -> QALoRAQuantConfig:
    """The base's quantization config with what was merged, and the group sizes after splitting."""
    config = base.config.to_dict()
    split = {m.merged_spec.group_size for m in layers.values() if m.merged_spec != m.spec}
    if split:
        config["group_size"] = min(split)
        config["dynamic"] = {}
        for name, spec in base.layers.items():
            spec = layers[name].merged_spec if name in layers else spec
            if (spec.bits, spec.group_size) != (config["bits"], config["group_size"]):
                config["dynamic"][name] = {"bits": spec.bits, "group_size": spec.group_size}
    config["merged"] = {
        # the name alone: a path would be published, and the hash identifies it
        "adapter": adapter.directory.resolve().name,
        "adapter_sha256": adapter.sha256(),
        "peft_type": adapter.peft_type,
        "convention": convention,
        "adapt": adapter.adapt,
        "r": adapter.config["r"],
        "lora_alpha": adapter.config["lora_alpha"],
        "layers": len(layers),
        "modules_to_save": sorted(adapter.saved),
        "base_merged": base.config.merged,
    }
    return QALoRAQuantConfig(**config)


def _write_weights(
    partial: Path, plan: MergePlan, progress: Callable[[int, int], None] | None
) -> None:
    writer = CheckpointWriter(partial, split_plan(plan.tensors))
    layer: str | None = None
    parts: dict[str, torch.Tensor] = {}
    done = 0
    for index, names in enumerate(writer.plans):
        with writer.shard(index) as shard:
            for name in names:
                owner = name.rpartition(".")[0]
                if name in plan.adapter.saved:
                    shard.write(name, plan.adapter.get(plan.adapter.saved[name]))
                elif name in parts or (owner in plan.base.layers and not name.endswith(".bias")):
                    if owner != layer:  # a layer's tensors follow each other in the plan
                        layer, parts = owner, plan.stored(owner)
                    shard.write(name, parts[name])
                else:
                    shard.write_raw(name, plan.base.reader.chunks(plan.copies.get(name, name)))
                done += 1
                if progress is not None:
                    progress(done, len(plan.tensors))
    writer.finish()
