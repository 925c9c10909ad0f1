"""Write directories that stock transformers loads with torchao, without this package.

Each quantized weight is a torchao `IntxUnpackedToInt8Tensor` (torchao 0.17,
`quantization/quantize_/workflows/intx/`), flattened into safetensors as
`torchao/prototype/safetensors` does:

    <name>._weight_qdata       int8 [N, K]      q - mid
    <name>._weight_scale       fp32 [N, blocks]
    <name>._weight_zero_point  fp32 [N, blocks] -offsets / scales, so W = (qdata - zero) * scale

The metadata of the file names the type, the block and the dtype of every tensor.
"""

import json
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.stored import TensorPlan

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..directory import (
    DenseLayers,
    dense_config,
    regroup,
    without_zero_scales,
    write_directory,
)
from ..export import ExportResult, Progress, obstacles
from . import FORMAT

EXACTNESS = (
    "Exact in fp32 (to its rounding, 1e-6 of a weight), the dtype that config.json asks for; after "
    "model.to(torch.bfloat16) torchao rounds scales, zero-points and weights to bf16."
)
_NO_LAYER_HAS = "int7"


class TorchAOLayers(DenseLayers):
    """Quantized layers as torchao holds them; it has no short last group, so groups are cut."""

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Return full names, dtypes and shapes of a layer's tensors."""
        n, k = spec.out_features, spec.in_features
        grid = (torch.float32, (n, k // FORMAT.grids.block(spec)))
        return {
            f"{name}._weight_qdata": (torch.int8, (n, k)),
            f"{name}._weight_scale": grid,
            f"{name}._weight_zero_point": grid,
        }

    def convert(self, name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Return these tensors."""
        weight, spec = without_zero_scales(weight), weight.spec
        block = FORMAT.grids.block(spec)
        zeros = -(weight.offsets.double() / weight.scales.double()).float()
        centred = weight.codes().to(torch.int16) - spec.mid
        return {
            f"{name}._weight_qdata": centred.to(torch.int8),
            f"{name}._weight_scale": regroup(weight.scales, spec, block),
            f"{name}._weight_zero_point": regroup(zeros, spec, block),
        }


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`."""
    checkpoint = open_quantized(source)
    reasons = obstacles(checkpoint, FORMAT)
    metadata = _metadata(checkpoint, reasons)
    config = dense_config(checkpoint)
    config["dtype"] = "float32"
    config["quantization_config"] = _quantization_config(checkpoint, reasons)
    target = write_directory(
        checkpoint, out, TorchAOLayers(), config, reasons, metadata=metadata, progress=progress
    )
    layers = len(checkpoint.layers) - len(reasons)
    return ExportResult(target, FORMAT.name, layers, EXACTNESS, reasons)


def _attributes(spec: QuantSpec) -> str:
    data = {
        "target_dtype": _dtype(f"int{spec.bits}"),
        "block_size": [1, FORMAT.grids.block(spec)],
        "dtype": _dtype("float32"),
        "activation_quantization": None,
    }
    names = ["qdata", "scale", "zero_point"]
    return json.dumps(
        {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": names}
    )


def _metadata(source: QuantizedCheckpoint, reasons: dict[str, str]) -> dict[str, str]:
    plain = json.dumps({"_type": "Tensor"})
    tensors = dict.fromkeys(source.dense_names, plain)
    for name, spec in source.layers.items():
        tensors[f"{name}.weight"] = plain if name in reasons else _attributes(spec)
    return {"format": "pt", "tensor_names": json.dumps(list(tensors)), **tensors}


def _quantization_config(source: QuantizedCheckpoint, reasons: dict[str, str]) -> dict[str, Any]:
    group_size = max(source.config.group_size, 1)
    data = {
        # transformers takes each tensor's type from the metadata. vLLM makes tensors of this one,
        # whose integer zero-points would truncate ours, and refuses to copy into another type
        "weight_dtype": _dtype(_NO_LAYER_HAS),
        "granularity": {"_type": "PerGroup", "_version": 1, "_data": {"group_size": group_size}},
        "mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
        "scale_dtype": _dtype("float32"),
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    }
    kept = set(source.config.modules_to_not_convert or []) | set(reasons)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}},
        "modules_to_not_convert": sorted(kept),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}
