"""Write stock GPTQ directories, for AutoGPTQ, GPTQModel and every runtime with GPTQ kernels.

The format stores integer zero-points. A model has them that was quantized with
`--zero-points integer` and adapted with adapt="scales"; any other is refused by name, unless
`requantize` asks for what is not exact.

The layout is that of `read`. Two versions: "gptq" (v1), which AutoGPTQ and GPTQModel read, and
"gptq_v2", which GPTQModel reads. At 3 bits GPTQModel before 7.0 misreads v1 zero-points that
AutoGPTQ wrote, and the other way round: there v1 is for AutoGPTQ, v2 for GPTQModel.
"""

import copy
import re
from pathlib import Path
from typing import Any, Literal

import torch

from qalora_kernels import SCALES_DTYPE, QuantSpec
from qalora_kernels.packing import pack_columns
from qalora_kernels.stored import TensorPlan

from ..._version import __version__
from ...architecture.model import read_architecture
from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...errors import ConfigError
from ...files.atomic import AtomicDirectory
from ...files.json import write_json
from ...files.names import CONFIG_FILE, QUANTIZE_CONFIG_FILE
from ...files.reader import CheckpointReader
from ...files.writer import bound_to, write_weights
from ..export import ExportResult, Progress, refuse_calibration
from ..zero_points import integer_zeros
from . import FORMAT
from .limits import VERSIONS, check_specs, has_head
from .limits import check_writable as check

__all__ = ["check", "check_specs", "export", "write_stock_gptq"]

EXACTNESS = "Exact: integers, scales and zero-points as they are."
# GPTQModel reads an asymmetric v1 checkpoint only if it names itself, from this version on, as the
# producer: the first that stored zero-points unclipped, as we do
_GPTQMODEL_COMPATIBLE = "gptqmodel:0.9.0"


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
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
        target = write_stock_gptq(checkpoint, out, checkpoint_format, progress)
        return ExportResult(target, FORMAT.name, len(checkpoint.layers), EXACTNESS)
    from ..requantize import Text, export_requantized  # which takes the quantizer

    check_specs(checkpoint.layers, checkpoint_format, checkpoint.config)

    def write(integer: Path, target: Path) -> None:
        write_stock_gptq(integer, target, checkpoint_format)

    return export_requantized(checkpoint, out, FORMAT, write, Text(**text), progress)


def write_stock_gptq(
    source: str | Path | QuantizedCheckpoint,
    target: str | Path,
    checkpoint_format: str = "gptq",
    progress: Progress | None = None,
) -> Path:
    """Write a model with integer zero-points as a stock GPTQ directory. Nothing is rounded.

    Args:
        source: a directory, or an open checkpoint.
        target: the directory to make, which is returned.
        checkpoint_format: "gptq" or "gptq_v2".
        progress: called with (tensors written, tensors in all).

    Raises:
        OutputError: the target is not empty, or cannot be written.
        ConfigError: an unknown format, or with "gptq" layers of different widths or a quantized
            head.
        CheckpointError: a zero-point that is not an integer in range, or a layer whose sizes the
            stock format does not hold.
    """
    if checkpoint_format not in VERSIONS:
        raise ConfigError(
            f"checkpoint_format: expected one of {VERSIONS}, found {checkpoint_format!r}"
        )
    directory = AtomicDirectory(target)
    if not isinstance(source, QuantizedCheckpoint):
        source = open_quantized(source)
    symmetric = check(source, checkpoint_format)
    plan, copies = _plan(source)
    config, quantize_config = _configs(source, checkpoint_format, symmetric)

    def convert(name: str) -> dict[str, torch.Tensor]:
        return _stock_layer(source, name, checkpoint_format)

    with directory as partial:
        metadata = bound_to(config)
        write_weights(partial, plan, copies, convert, metadata=metadata, progress=progress)
        source.write_side_files(partial)
        write_json(partial / CONFIG_FILE, config)
        write_json(partial / QUANTIZE_CONFIG_FILE, quantize_config)
    return directory.target


def _plan(
    source: QuantizedCheckpoint,
) -> tuple[TensorPlan, dict[str, tuple[CheckpointReader, str]]]:
    """Return what to write, and where dense tensors, and those tied to one, are copied from."""
    copies = {name: (source.reader, name) for name in source.dense_names}
    architecture = read_architecture(source.reader.config, source.weight_names)
    # AutoGPTQ leaves what is tied and left out of the file random
    for name, original in (architecture.tied if architecture else {}).items():
        if original in copies:
            copies.setdefault(name, copies[original])
    infos = {name: reader.info(original) for name, (reader, original) in copies.items()}
    plan: TensorPlan = {name: (info.dtype, info.shape) for name, info in infos.items()}
    for name, spec in source.layers.items():
        n, groups = spec.out_features, spec.num_groups
        plan[f"{name}.qweight"] = (torch.int32, (spec.packed_rows, n))
        plan[f"{name}.qzeros"] = (torch.int32, (groups, n * spec.bits // 32))
        plan[f"{name}.scales"] = (SCALES_DTYPE, (groups, n))
        plan[f"{name}.g_idx"] = (torch.int32, (spec.in_features,))
    return plan, copies


def _stock_layer(source: QuantizedCheckpoint, name: str, version: str) -> dict[str, torch.Tensor]:
    weight = source.layer(name)
    spec, g_idx = weight.spec, weight.g_idx
    zeros = integer_zeros(f"{source.directory}: {name}", weight, FORMAT)
    if g_idx is None:
        g_idx = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
    return {
        f"{name}.qweight": weight.qweight,
        f"{name}.qzeros": pack_columns(zeros - 1 if version == "gptq" else zeros, spec.bits),
        f"{name}.scales": weight.scales.to(SCALES_DTYPE),
        f"{name}.g_idx": g_idx,
    }


def _grid(spec: QuantSpec, usual: int) -> tuple[int, int]:
    """Return bits and group_size as GPTQModel has them: -1 for one group of all inputs."""
    whole = spec.group_size == spec.in_features and spec.group_size != usual
    return spec.bits, -1 if whole else spec.group_size


def _configs(
    source: QuantizedCheckpoint, checkpoint_format: str, symmetric: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    ours = source.config
    old_3bit = ours.bits == 3 and checkpoint_format == "gptq"
    producers = [f"qalora:{__version__}"] + ([] if old_3bit else [_GPTQMODEL_COMPATIBLE])
    quantize_config = {
        "bits": ours.bits,
        "group_size": ours.group_size,
        "desc_act": ours.desc_act,
        # where GPTQModel would misread the zero-points, it refuses an asymmetric file instead
        "sym": symmetric and not old_3bit,
        # of a base with a quantized head: GPTQModel looks for its tensors only if told so
        "lm_head": has_head(source.layers),
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": 0.01,
        "true_sequential": True,
        "static_groups": False,
        "meta": {"quantizer": producers},
    }
    if ours.dynamic:
        grids = {name: _grid(spec, ours.group_size) for name, spec in source.layers.items()}
        quantize_config["dynamic"] = {
            f"+:^{re.escape(name)}$": {"bits": bits, "group_size": group_size}
            for name, (bits, group_size) in grids.items()
            if (bits, group_size) != (ours.bits, ours.group_size)
        }
    config = copy.deepcopy(source.reader.config)
    config["quantization_config"] = quantize_config
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False
    return config, quantize_config
