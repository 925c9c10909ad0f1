"""Directories that mlx-lm loads.

MLX's affine quantization (mlx `ops.cpp`, `affine_dequantize`): W = scales * q + biases, groups of
32, 64 or 128 neighbouring inputs, q in a bit stream of 32-bit words along the inputs, low bits
first. That is GPTQ's stream, so qweight is only transposed:

    <name>.weight  uint32 [N, K * bits / 32]
    <name>.scales  fp32   [N, groups]
    <name>.biases  fp32   [N, groups]     offsets - scales * 2^(bits-1)

MLX computes in the widest dtype that it meets, so fp32 scales, biases and norms make it compute in
fp32. Nothing but safetensors is needed to write it.
"""

import math
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...checkpoint.layout import TensorPlan
from ...files.safetensors import TensorInfo
from ..rope import with_legacy_rope
from ..walk import ExportResult, Progress, dense_config, obstacles, regroup, write_directory

GROUP_SIZES = (128, 64, 32)
EXACTNESS = "Exact in fp32 (scales and biases are stored so, to 1e-7 of themselves)."


class MLX:
    """`LayerFormat` of MLX."""

    name = "mlx"

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Norms and biases in fp32, or activations would be rounded to their dtype."""
        is_vector = len(info.shape) == 1 and info.dtype.is_floating_point
        return torch.float32 if is_vector else info.dtype

    @staticmethod
    def block(spec: QuantSpec) -> int | None:
        """The largest of MLX's group sizes that the layer's groups can be cut into."""
        both = math.gcd(spec.group_size, spec.in_features)
        return next((size for size in GROUP_SIZES if both % size == 0), None)

    def obstacle(self, spec: QuantSpec, act_order: bool) -> str | None:
        """Why the layer cannot be held as integers, or None."""
        if act_order:
            return "its groups follow act-order (g_idx), MLX's are neighbours"
        if self.block(spec) is None:
            return (
                f"groups of {spec.group_size} in {spec.in_features} inputs cannot be cut into "
                "whole groups of 32, 64 or 128, which MLX has"
            )
        return None

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Names, dtypes and shapes of the layer's tensors."""
        n, block = spec.out_features, self.block(spec)
        assert block is not None
        grid = (torch.float32, (n, spec.in_features // block))
        return {
            f"{name}.weight": (torch.uint32, (n, spec.packed_rows)),
            f"{name}.scales": grid,
            f"{name}.biases": grid,
        }

    def convert(self, name: str, spec: QuantSpec, layer: PackedWeight) -> dict[str, torch.Tensor]:
        """These tensors."""
        block = self.block(spec)
        assert block is not None
        biases = (layer.offsets.double() - layer.scales.double() * spec.mid).float()
        return {
            f"{name}.weight": layer.qweight.t().contiguous().view(torch.uint32),
            f"{name}.scales": regroup(layer.scales, spec, block),
            f"{name}.biases": regroup(biases, spec, block),
        }


def check(source: QuantizedCheckpoint) -> dict[str, str]:
    """Layers that become dense, and why; see `obstacles`."""
    return obstacles(source, MLX().obstacle, MLX.name)


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`."""
    checkpoint = open_quantized(source)
    format = MLX()
    reasons = check(checkpoint)
    config = _config(checkpoint, reasons)
    metadata = {"format": "mlx"}
    target = write_directory(checkpoint, out, format, config, reasons, metadata, progress)
    layers = len(checkpoint.layers) - len(reasons)
    return ExportResult(target, format.name, layers, EXACTNESS, reasons)


def _config(source: QuantizedCheckpoint, reasons: dict[str, str]) -> dict[str, Any]:
    """config.json with `quantization` as mlx_lm.convert writes it."""
    config = with_legacy_rope(dense_config(source))
    if "text_config" in config:
        config["text_config"] = with_legacy_rope(config["text_config"])
    grids = {
        name: {"group_size": MLX.block(spec), "bits": spec.bits, "mode": "affine"}
        for name, spec in source.layers.items()
        if name not in reasons
    }
    common = next(iter(grids.values()))
    quantization = {
        **common,
        **{name: grid for name, grid in grids.items() if grid != common},
        **dict.fromkeys(reasons, False),
    }
    return {**config, "quantization": quantization, "quantization_config": quantization}
