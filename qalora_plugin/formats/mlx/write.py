"""Write directories that mlx-lm loads.

MLX's affine quantization (mlx `ops.cpp`, `affine_dequantize`): W = scales * q + biases, groups of
32, 64 or 128 neighbouring inputs, q in a bit stream of 32-bit words along the inputs, low bits
first. That is GPTQ's stream, so qweight is only transposed:

    <name>.weight  uint32 [N, K * bits / 32]
    <name>.scales  fp32   [N, groups]
    <name>.biases  fp32   [N, groups]     offsets - scales * 2^(bits-1)

The layers of all experts are one layer, whose tensors have a leading E.

MLX computes in the widest dtype that it meets, so fp32 scales, biases and norms make it compute in
fp32. Nothing but safetensors is needed to write it.
"""

import math
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.stored import TensorPlan

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...files.safetensors import TensorInfo
from ..directory import DenseLayers, regroup, write_directory
from ..export import ExportResult, Progress, obstacles
from ..features import (
    PERIODIC,
    Family,
    all_settings,
    layer_kinds,
    period_of,
    read_config,
)
from ..rope import with_legacy_rope
from ..stacks import expert_stacks, projection
from . import FORMAT

EXACTNESS = "Exact in fp32 (scales and biases are stored so, to 1e-7 of themselves)."


_PERIODIC = Family(
    written=frozenset({"query_pre_attn_scalar"}), windows=PERIODIC, ropes=("default", "linear")
)
_SOFT_CAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
_ROPES = ("default", "linear", "llama3", "yarn")
_ROUTING = frozenset({
    "decoder_sparse_step", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    "num_local_experts",
})  # fmt: skip
FAMILIES = {
    "llama": Family(frozenset({"attention_bias", "mlp_bias"}), ropes=_ROPES),
    "mistral": Family(ropes=_ROPES),
    "qwen2": Family(ropes=_ROPES, any_head_size=False),
    "qwen3": Family(ropes=_ROPES),
    "gemma": Family(built_in={"hidden_act": "gelu"}),
    "gemma2": Family(frozenset({"query_pre_attn_scalar", *_SOFT_CAPS})),
    "gemma3_text": _PERIODIC,
    "qwen3_moe": Family(_ROUTING | {"norm_topk_prob", "mlp_only_layers"}, ropes=_ROPES),
    "mixtral": Family(_ROUTING, ropes=_ROPES),
    "olmoe": Family(_ROUTING | {"norm_topk_prob", "attention_bias"}, ropes=_ROPES),
    "qwen2_moe": Family(
        _ROUTING - {"decoder_sparse_step"} | {"shared_expert_intermediate_size"},
        any_head_size=False,
    ),
}
# the norms of Gemma 3 whose output is added to the residual stream
_ADDING_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


def residual_factor(config: Any) -> float:
    """Return by how much mlx-lm's residual stream of a model is larger than transformers'.

    For Gemma 3 mlx-lm rounds the square root of hidden_size, which embeddings are multiplied with,
    to bf16 (mlx_lm/models/gemma3_text.py, `Gemma3Model`), transformers to the model's dtype. Norms
    undo a factor of the whole stream, so it is enough that what is added has it too.
    """
    if config.model_type != "gemma3_text":
        return 1.0
    root = math.sqrt(config.hidden_size)
    return torch.tensor(root).bfloat16().item() / root


class MLXLayers(DenseLayers):
    """Quantized layers as MLX holds them."""

    def __init__(self, config: Any) -> None:
        self._scales_embedding = config.model_type.startswith("gemma")
        self._factor = residual_factor(config)

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return fp32 where activations would be rounded: norms, biases, embeddings that grow."""
        is_vector = len(info.shape) == 1 and info.dtype.is_floating_point
        scaled = self._scales_embedding and info.name.endswith("embed_tokens.weight")
        return torch.float32 if is_vector or scaled else info.dtype

    def changes(self, name: str) -> bool:
        """Say whether a norm is among those that `residual_factor` is folded into."""
        return self._factor != 1 and name.endswith(_ADDING_NORMS)

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return such a norm, fp32; Gemma computes with 1 + its weight."""
        return ((1 + tensor.double()) * self._factor - 1).float()

    def stack_name(self, stack: str) -> str:
        """Return the name of a stack's `SwitchLinear` (mlx_lm/models/switch_layers.py)."""
        experts, _, name = stack.rpartition(".")
        return f"{experts.removesuffix('experts')}switch_mlp.{projection(name)}"

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Return full names, dtypes and shapes of a layer's tensors."""
        n, block = spec.out_features, FORMAT.grids.block(spec)
        grid = (torch.float32, (n, spec.in_features // block))
        return {
            f"{name}.weight": (torch.uint32, (n, spec.packed_rows)),
            f"{name}.scales": grid,
            f"{name}.biases": grid,
        }

    def convert(self, name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Return these tensors."""
        spec, block = weight.spec, FORMAT.grids.block(weight.spec)
        biases = (weight.offsets.double() - weight.scales.double() * spec.mid).float()
        return {
            f"{name}.weight": weight.qweight.t().contiguous().view(torch.uint32),
            f"{name}.scales": regroup(weight.scales, spec, block),
            f"{name}.biases": regroup(biases, spec, block),
        }


def check(source: QuantizedCheckpoint) -> Any:
    """Return transformers' config of a model that mlx-lm can run.

    Raises:
        CheckpointError: mlx-lm would compute something else.
    """
    return read_config(source, FAMILIES, FORMAT.runs_in)


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`."""
    checkpoint = open_quantized(source)
    reasons = obstacles(checkpoint, FORMAT)
    found = check(checkpoint)
    config, metadata = _config(checkpoint, found, reasons), {"format": "mlx"}
    target = write_directory(
        checkpoint, out, MLXLayers(found), config, reasons, metadata=metadata, progress=progress
    )
    layers = len(checkpoint.layers) - len(reasons)
    return ExportResult(target, FORMAT.name, layers, EXACTNESS, reasons)


def _config(source: QuantizedCheckpoint, found: Any, reasons: dict[str, str]) -> dict[str, Any]:
    config = with_legacy_rope(all_settings(found))
    if found.model_type == "gemma3_text":
        config["sliding_window_pattern"] = period_of(layer_kinds(found)) or 1
    layers, stacks = MLXLayers(found), expert_stacks(source)
    names = {name: name for name in source.layers}
    for stack, members in stacks.items():
        names |= dict.fromkeys(members, layers.stack_name(stack))
    grids = {
        names[name]: {"group_size": FORMAT.grids.block(spec), "bits": spec.bits, "mode": "affine"}
        for name, spec in source.layers.items()
        if name not in reasons
    }
    common = next(iter(grids.values()))
    quantization = {
        **common,
        **{name: grid for name, grid in grids.items() if grid != common},
        **{names[name]: False for name in reasons},
    }
    return {**config, "quantization": quantization, "quantization_config": quantization}
