"""Write an adapter that pools as a plain PEFT LoRA adapter for the quantized base as it is.

    pool(x) A^T = x A'^T   with A'[:, k] = A[:, group of k]

so A' [r, K] beside the same B computes the same output with any LoRA code, such as PEFT, with
its own kernels for the base and several adapters on one base. Exact, and nothing is rounded;
the merged model differs from it only by the rounding of its stored offsets.
"""

from pathlib import Path
from typing import Any

import torch

from qalora_kernels.groups import group_index
from qalora_kernels.stored import TensorPlan

from ...checkpoint.side_files import TOKENIZER_FILES, copy_side_files
from ...errors import AdapterError
from ...files.atomic import AtomicDirectory
from ...files.hub import locate
from ...files.json import write_json
from ...files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ...files.writer import ShardWriter
from ...merge.adapter import PREFIX
from ...merge.pairing import LayerMerge
from ...merge.plan import MergePlan, plan_merge
from ..export import ExportResult, Progress, refuse_experts
from . import FORMAT

EXACTNESS = (
    "Exact: the same output as base and adapter. The merged model differs by the rounding of "
    "its stored offsets."
)
# fields of LoRA's config that the adapter's own config has as well
_COPIED = (
    "lora_alpha",
    "modules_to_save",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "task_type",
    "use_rslora",
)


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    base: str | Path | None = None,
    convention: str = "auto",
) -> ExportResult:
    """Write the adapter `source`; see `export_model`, and `merge_adapter` for the options.

    Raises:
        AdapterError: it changes scales, which is no low-rank change of the weight.
    """
    directory = AtomicDirectory(out)
    plan = plan_merge(source, base, convention)
    refuse_experts(plan.base, FORMAT)
    adapter = plan.adapter
    if adapter.adapt not in FORMAT.adapts:
        raise AdapterError(
            f"{adapter.directory / ADAPTER_CONFIG_FILE}: adapt={adapter.adapt!r} changes "
            "scales, which is no low-rank change of the weights, so no LoRA adapter is equal to "
            "it. Merge it and export the merged model (format gptq keeps it exact on an "
            "integer-zero base)."
        )
    named = base or locate(adapter.config["base_model_name_or_path"], adapter.directory)
    config = _config(plan, str(named))
    with directory as partial:
        writer = ShardWriter(partial / ADAPTER_WEIGHTS_FILE, _plan(plan))
        for done, name in enumerate(plan.layers, start=1):
            for key, matrix in zip(layer_keys(plan, name), _expand(plan, name), strict=True):
                writer.write(key, matrix)
            if progress is not None:
                progress(done, len(plan.layers))
        for key in saved_keys(plan):
            writer.write(key, adapter.get(key))
        writer.close()
        write_json(partial / ADAPTER_CONFIG_FILE, config)
        copy_side_files(adapter.directory, partial, TOKENIZER_FILES)
    return ExportResult(directory.target, FORMAT.name, len(plan.layers), EXACTNESS)


def saved_keys(plan: MergePlan) -> list[str]:
    """Return the keys of whole tensors, each once: one may have several names in the model."""
    return list(dict.fromkeys(plan.dense.from_adapter.values()))


def layer_keys(plan: MergePlan, name: str) -> tuple[str, str]:
    """Return the names of a layer's A' and B in the exported adapter."""
    start = f"{PREFIX}{plan.trained.in_model(name)}.lora_"
    return f"{start}A.weight", f"{start}B.weight"


def groups_of_inputs(plan: MergePlan, name: str) -> torch.Tensor:
    """Return the merged group of every input of a layer, int64 [K]."""
    spec = plan.layers[name].merged_spec
    return group_index(
        plan.base.g_idx(name), spec.group_size, spec.in_features, torch.device("cpu")
    ).long()


def _plan(plan: MergePlan) -> TensorPlan:
    adapter = plan.adapter
    tensors: TensorPlan = {}
    for name, merge in plan.layers.items():
        key_a, key_b = layer_keys(plan, name)
        a, b = (adapter.reader.info(key) for key in merge.layer.keys["zeros"])
        tensors[key_a] = (a.dtype, (merge.layer.rank, merge.spec.in_features))
        tensors[key_b] = (_dtype_of_b(merge, b.dtype), b.shape)
    for key in saved_keys(plan):
        tensors[key] = (adapter.reader.info(key).dtype, adapter.reader.info(key).shape)
    return tensors


def _expand(plan: MergePlan, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A' [r, K] and B [N, r], B times the factor of the convention (1 for ours)."""
    merge = plan.layers[name]
    a, b = plan.adapter.get_pair(merge.layer.keys["zeros"])
    expanded = merge.regrouping.spread(a).index_select(1, groups_of_inputs(plan, name))
    factor = _own_factor(merge)
    scaled = b.clone() if factor == 1 else (b.double() * factor).to(_dtype_of_b(merge, b.dtype))
    return expanded.contiguous(), scaled


def _own_factor(merge: LayerMerge) -> float:
    return merge.factor / merge.layer.scaling


def _dtype_of_b(merge: LayerMerge, stored: torch.dtype) -> torch.dtype:
    """Return the dtype of B: times a factor its numbers have more digits than 16 bits hold."""
    return stored if _own_factor(merge) == 1 else torch.promote_types(stored, torch.float32)


def _config(plan: MergePlan, base: str) -> dict[str, Any]:
    """Return adapter_config.json; `base` is as it was given: a Hub id stays one."""
    adapter, is_local = plan.adapter, Path(base).expanduser().is_dir()
    config = {key: adapter.config[key] for key in _COPIED if key in adapter.config}
    return {
        **config,
        "peft_type": "LORA",
        "base_model_name_or_path": str(plan.base.directory.absolute()) if is_local else base,
        "target_modules": _target_modules(plan),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }


def _target_modules(plan: MergePlan) -> list[str]:
    """Return last parts of names, as serving engines want them, if these mean the same layers."""
    short = {name.rpartition(".")[2] for name in plan.layers}
    dense = {name.rpartition(".")[0] for name in plan.base.dense_names}
    selected = {n for n in dense | set(plan.base.layers) if n.rpartition(".")[2] in short}
    if selected == set(plan.layers):
        return sorted(short)
    return sorted(plan.trained.in_model(name) for name in plan.layers)
