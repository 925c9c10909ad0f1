"""Write directories that mlx-lm loads.

MLX's affine quantization (mlx `ops.cpp`, `affine_dequantize`): W = scales * q + biases, groups of
32, 64 or 128 neighbouring inputs, q in a bit stream of 32-bit words along the inputs, low bits
first. That is GPTQ's stream, so qweight is only transposed:

    <name>.weight  uint32 [N, K * bits / 32]
    <name>.scales  fp32   [N, groups]
    <name>.biases  fp32   [N, groups]     offsets - scales * 2^(bits-1)

MLX computes in the widest dtype that it meets, so fp32 scales, biases and norms make it compute in
fp32. Nothing but safetensors is needed to write it.
"""

from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.stored import TensorPlan

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...files.safetensors import TensorInfo
from ..directory import DenseLayers, dense_config, regroup, write_directory
from ..export import ExportResult, Progress, obstacles
from ..rope import with_legacy_rope
from . import FORMAT

EXACTNESS = "Exact in fp32 (scales and biases are stored so, to 1e-7 of themselves)."


class MLXLayers(DenseLayers):
    """Quantized layers as MLX holds them."""

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return fp32 for norms and biases: activations would be rounded to their dtype."""
        is_vector = len(info.shape) == 1 and info.dtype.is_floating_point
        return torch.float32 if is_vector else info.dtype

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


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`."""
    checkpoint = open_quantized(source)
    reasons = obstacles(checkpoint, FORMAT)
    config, metadata = _config(checkpoint, reasons), {"format": "mlx"}
    target = write_directory(
        checkpoint, out, MLXLayers(), config, reasons, metadata=metadata, progress=progress
    )
    layers = len(checkpoint.layers) - len(reasons)
    return ExportResult(target, FORMAT.name, layers, EXACTNESS, reasons)


def _config(source: QuantizedCheckpoint, reasons: dict[str, str]) -> dict[str, Any]:
    config = with_legacy_rope(dense_config(source))
    if "text_config" in config:
        config["text_config"] = with_legacy_rope(config["text_config"])
    grids = {
        name: {"group_size": FORMAT.grids.block(spec), "bits": spec.bits, "mode": "affine"}
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
