"""A plain PEFT LoRA adapter for the quantized base as it is, from an adapter that pools.

    pool(x) A^T = x A'^T   with A'[:, k] = A[:, group of k]

so A' [r, K] beside the same B computes the same output with any LoRA code: PEFT, vLLM, SGLang, with
their own kernels for the base and several adapters on one base. Exact, and nothing is rounded;
the merged model differs from it only by the rounding of its stored offsets.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qalora_kernels.groups import group_index

from ..adapter import CONFIG_FILE, PREFIX, WEIGHTS_FILE, Adapter
from ..checkpoint.atomic import AtomicDirectory
from ..checkpoint.side_files import TOKENIZER_FILES, copy_side_files
from ..errors import AdapterError
from ..merge import MergePlan, plan_merge
from ..pairing import LayerMerge
from .walk import ExportResult, Progress

# fields of LoRA's config that the adapter's own config has as well
_COPIED = (
    "base_model_name_or_path",
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
) -> ExportResult:
    """Write the adapter; see `export_model`.

    Raises:
        AdapterError: it changes scales, which is no low-rank change of the weight.
    """
    directory = AtomicDirectory(out)
    plan = plan_merge(source, base)
    adapter = plan.adapter
    if adapter.adapt != "zeros":
        raise AdapterError(
            f"{adapter.directory / CONFIG_FILE}: adapt={adapter.adapt!r} changes scales, which "
            "is no low-rank change of the weights, so no LoRA adapter is equal to it. Merge it "
            "and export the merged model (format gptq keeps it exact on an integer-zero base)."
        )
    tensors = {}
    for done, (name, merge) in enumerate(plan.layers.items(), start=1):
        key = f"{PREFIX}{_trained_name(adapter, name)}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = _expand(
            adapter, merge, _g_idx(plan, name)
        )
        if progress is not None:
            progress(done, len(plan.layers))
    for key in adapter.saved.values():
        tensors[key] = adapter.get(key)
    config = _config(plan)
    with directory as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(0o644)  # save_file leaves it private
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        copy_side_files(adapter.directory, partial, TOKENIZER_FILES)
    exactness = (
        "Exact: the same output as base and adapter. The merged model differs by the rounding of "
        "its stored offsets."
    )
    return ExportResult(directory.target, "lora", len(plan.layers), exactness)


def _trained_name(adapter: Adapter, name: str) -> str:
    """Name in the model that PEFT wraps; of the base's file where they differ."""
    return adapter.trained_name(name)


def _g_idx(plan: MergePlan, name: str) -> torch.Tensor | None:
    return plan.base.reader.get(f"{name}.g_idx") if plan.base.config.desc_act else None


def _expand(
    adapter: Adapter, merge: LayerMerge, g_idx: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A' [r, K] and B [N, r], B times the factor of the convention (1 for ours)."""
    a, b = adapter.get_pair(merge.layer.keys["zeros"])
    spec = merge.merged_spec
    index = group_index(g_idx, spec.group_size, spec.in_features, a.device).long()
    expanded = merge.regrouping.spread(a).index_select(1, index)
    factor = merge.factor / merge.layer.scaling
    return expanded.contiguous(), b.clone() if factor == 1 else (b.double() * factor).to(b.dtype)


def _config(plan: MergePlan) -> dict[str, Any]:
    adapter = plan.adapter
    config = {key: adapter.config[key] for key in _COPIED if key in adapter.config}
    names = sorted(_trained_name(adapter, name) for name in plan.layers)
    short = sorted({name.rpartition(".")[2] for name in names})
    # short names where they mean the same layers: what vLLM and SGLang expect
    every = {name for name in plan.base.layers if name.rpartition(".")[2] in short}
    config["target_modules"] = short if every == set(plan.layers) else names
    return {
        **config,
        "peft_type": "LORA",
        "base_model_name_or_path": str(plan.base.directory),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
