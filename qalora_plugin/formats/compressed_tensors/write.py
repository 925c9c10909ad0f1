"""Write compressed-tensors directories (format pack-quantized), for vLLM and stock transformers.

The format stores integer zero-points: see `formats.gptq.write` on which models have them. The
layout is that of `layout`. 2 and 3 bits are stored in codes of 4, which vLLM has kernels for; a
group that the inputs are no multiple of is cut into smaller ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qalora_kernels import SCALES_DTYPE, PackedWeight, QuantSpec
from qalora_kernels.packing import pack
from qalora_kernels.stored import TensorPlan

from ...architecture.model import read_architecture
from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..directory import DenseLayers, dense_config, regroup, write_directory
from ..export import ExportResult, Progress, obstacles, refuse_calibration
from ..zero_points import integer_zeros
from . import FORMAT
from .layout import SCALE, SHAPE, WEIGHT, ZERO_POINT, pack_zeros, words

EXACTNESS = (
    "Exact in float16 and float32: integers, scales and zero-points as they are (bfloat16 rounds "
    "the scales)."
)


class PackedLayers(DenseLayers):
    """Quantized layers as compressed-tensors holds them.

    Args:
        symmetric: every zero-point is the middle code; none is stored.
    """

    def __init__(self, symmetric: bool) -> None:
        self._symmetric = symmetric

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Return full names, dtypes and shapes of a layer's tensors."""
        n, k, bits = spec.out_features, spec.in_features, stored_bits(spec)
        blocks = k // FORMAT.grids.block(spec)
        plan: TensorPlan = {
            f"{name}.{WEIGHT}": (torch.int32, (n, words(k, bits))),
            f"{name}.{SCALE}": (SCALES_DTYPE, (n, blocks)),
            f"{name}.{SHAPE}": (torch.int64, (2,)),
        }
        if not self._symmetric:
            plan[f"{name}.{ZERO_POINT}"] = (torch.int32, (words(n, bits), blocks))
        return plan

    def convert(self, name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Return these tensors.

        Raises:
            CheckpointError: a zero-point is no integer.
        """
        spec, bits, block = weight.spec, stored_bits(weight.spec), FORMAT.grids.block(weight.spec)
        lift = (1 << bits - 1) - spec.mid
        packed = weight.qweight
        if lift:
            packed = pack(weight.codes().t() + lift, bits)
        scales = weight.scales.to(SCALES_DTYPE)
        tensors = {
            f"{name}.{WEIGHT}": packed.t()[:, : words(spec.in_features, bits)].contiguous(),
            f"{name}.{SCALE}": regroup(scales, spec, block),
            f"{name}.{SHAPE}": torch.tensor([spec.out_features, spec.in_features]),
        }
        if not self._symmetric:
            zeros = regroup(integer_zeros(name, weight, FORMAT) + lift, spec, block)
            tensors[f"{name}.{ZERO_POINT}"] = pack_zeros(zeros.t(), bits)
        return tensors


def stored_bits(spec: QuantSpec) -> int:
    """Return the width in which a layer's codes are stored."""
    return max(spec.bits, 4)


def check(source: QuantizedCheckpoint) -> bool:
    """Check every layer of a quantized model; return whether all zero-points are the middle code.

    Raises:
        CheckpointError: a zero-point is not an integer in range.
    """
    symmetric, reasons = True, obstacles(source, FORMAT)
    for name, spec in source.layers.items():
        if name not in reasons:
            zeros = integer_zeros(f"{source.directory}: {name}", source.layer(name), FORMAT)
            symmetric = symmetric and bool((zeros == spec.mid).all())
    return symmetric


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    requantize: bool = False,
    **text: Any,
) -> ExportResult:
    """Write the directory; see `export_model`, and for `text` `formats.requantize.Text`.

    With `requantize` the merged weights are quantized again, with integer zero-points, and what
    that costs is measured.

    Raises:
        CheckpointError: zero-points are not integers, and `requantize` was not asked for.
        ConfigError: `requantize` of a model that needs none.
    """
    checkpoint = open_quantized(source)
    if not requantize:
        refuse_calibration(text)
        return _write(checkpoint, out, progress)
    from ..requantize import Text, export_requantized  # which takes the quantizer

    obstacles(checkpoint, FORMAT)

    def write(integer: Path, target: Path) -> None:
        _write(open_quantized(integer), target, None)

    return export_requantized(checkpoint, out, FORMAT, write, Text(**text), progress)


def _write(source: QuantizedCheckpoint, out: str | Path, progress: Progress | None) -> ExportResult:
    reasons, symmetric = obstacles(source, FORMAT), check(source)
    config = dense_config(source)
    config["quantization_config"] = _quantization_config(source, set(reasons), symmetric)
    layers = PackedLayers(symmetric)
    target = write_directory(source, out, layers, config, reasons, progress=progress)
    return ExportResult(target, FORMAT.name, len(source.layers) - len(reasons), EXACTNESS, reasons)


def _quantization_config(
    source: QuantizedCheckpoint, dense: set[str], symmetric: bool
) -> dict[str, Any]:
    """Return what compressed-tensors reads: one config group for each grid, and what has none."""
    grids: dict[tuple[int, int | None], list[str]] = {}
    for name, spec in source.layers.items():
        if name not in dense:
            block = FORMAT.grids.block(spec)
            size = None if block == spec.in_features else block
            grids.setdefault((stored_bits(spec), size), []).append(name)
    groups = {
        f"group_{index}": {
            # vLLM finds the parts of a fused layer by class, or each by its own name
            "targets": ["Linear"] if len(grids) == 1 else names,
            "weights": _weights(bits, size, symmetric),
            "input_activations": None,
            "output_activations": None,
        }
        for index, ((bits, size), names) in enumerate(grids.items())
    }
    return {
        "quant_method": FORMAT.quant_methods[0],
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _dense_linears(source, dense),
        "kv_cache_scheme": None,
    }


def _weights(bits: int, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
    }


def _dense_linears(source: QuantizedCheckpoint, dense: set[str]) -> list[str]:
    """Return the linear modules that are not quantized."""
    packed = set(source.layers) - dense
    architecture = read_architecture(source.reader.config, source.weight_names)
    if architecture is None:  # a class that transformers does not have: matrices, to be safe
        infos = [source.reader.info(name) for name in source.dense_names]
        names = [i.name.removesuffix(".weight") for i in infos if len(i.shape) == 2]
        return sorted({*names, *dense})
    stored = {
        name: architecture.stored_name(f"{name}.weight").removesuffix(".weight")
        for name, module in architecture.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return [name for name, original in stored.items() if original not in packed]
