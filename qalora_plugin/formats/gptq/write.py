"""Write a checkpoint with integer zero-points as a stock GPTQ one, for runtimes without us.

The layout is that of stock_gptq.py. Two formats: "gptq" (v1), which AutoGPTQ and GPTQModel read,
and "gptq_v2", which GPTQModel reads. At 3 bits GPTQModel before 7.0 misreads v1 zero-points that
AutoGPTQ wrote, and the other way round: there v1 is for AutoGPTQ, v2 for GPTQModel.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.packing import pack_columns

from ..._version import __version__
from ...architecture.model import read_architecture
from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...checkpoint.config import QALoRAQuantConfig
from ...checkpoint.layout import TensorPlan
from ...checkpoint.side_files import copy_side_files
from ...errors import CheckpointError, ConfigError
from ...files.atomic import AtomicDirectory
from ...files.json import write_json
from ...files.names import CONFIG_FILE, QUANTIZE_CONFIG_FILE
from ...files.writer import CheckpointWriter, split_plan

FORMATS = ("gptq", "gptq_v2")
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel 5.8 loads (`SUPPORTS_GROUP_SIZE` of its TorchQuantLinear)."""
# GPTQModel reads an asymmetric v1 checkpoint only if it names itself, from this version on, as the
# producer: the first that stored zero-points unclipped, as we do
_GPTQMODEL_COMPATIBLE = "gptqmodel:0.9.0"


def write_stock_gptq(
    source: str | Path | QuantizedCheckpoint, target: str | Path, checkpoint_format: str = "gptq"
) -> Path:
    """Write a quantized checkpoint in a stock GPTQ format. Nothing is rounded.

    Args:
        source: a local directory in our format (or an open checkpoint), with integer zero-points:
            quantized with `--zero-points integer`, or adapted with `adapt="scales"` from such a
            base.
        target: the directory to make.
        checkpoint_format: "gptq" or "gptq_v2".

    Returns:
        The directory written.

    Raises:
        OutputError: the target is not empty, or cannot be written.
        ConfigError: an unknown format, or layers of different widths with "gptq".
        CheckpointError: a zero-point that is not an integer in range, or a layer whose sizes the
            stock format does not hold.
    """
    if checkpoint_format not in FORMATS:
        raise ConfigError(
            f"checkpoint_format: expected one of {FORMATS}, found {checkpoint_format!r}"
        )
    directory = AtomicDirectory(target)
    if not isinstance(source, QuantizedCheckpoint):
        source = open_quantized(source)
    symmetric = check_writable(source, checkpoint_format)
    plan, copies = _plan(source)
    config, quantize_config = _configs(source, checkpoint_format, symmetric)
    with directory as partial:
        writer = CheckpointWriter(partial, split_plan(plan))
        for index, names in enumerate(writer.plans):
            with writer.shard(index) as shard:
                _write_shard(source, shard, names, copies, checkpoint_format)
        writer.finish()
        copy_side_files(source.directory, partial)
        write_json(partial / CONFIG_FILE, config)
        write_json(partial / QUANTIZE_CONFIG_FILE, quantize_config)
    return directory.target


def integer_zeros(where: str, layer: PackedWeight, spec: QuantSpec) -> torch.Tensor:
    """Zero-points z = mid - offsets / scales as integers, int32 [G, N].

    Raises:
        CheckpointError: one of them is not exactly an integer from 0 to 2^bits - 1.
    """
    exact = spec.mid - layer.offsets.double() / layer.scales.double()
    zeros = exact.round()
    top = (1 << spec.bits) - 1
    wrong = layer.scales.double() * (spec.mid - zeros) != layer.offsets.double()
    if wrong.any():
        distance = (exact - zeros).abs().amax().item()
        raise CheckpointError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} zero-points are not integers (up to "
            f"{distance:.3g} away), and stock GPTQ stores integers only. Quantize with "
            "`--zero-points integer` and adapt with adapt='scales', export to a format with "
            "real-valued offsets, or accept a measured loss: `qalora export MERGED --format gptq "
            "--requantize --calibration FILE`."
        )
    if zeros.amin() < 0 or zeros.amax() > top:
        raise CheckpointError(
            f"{where}: zero-points from {int(zeros.amin())} to {int(zeros.amax())}; stock GPTQ "
            f"stores 0 to {top}. Export to a format with real-valued offsets."
        )
    return zeros.to(torch.int32)


def check_writable(source: QuantizedCheckpoint, checkpoint_format: str = "gptq") -> bool:
    """Check every layer before anything is written; see `write_stock_gptq` for the errors.

    Returns:
        Whether all zero-points are the middle code.
    """
    if source.config.dynamic and checkpoint_format == "gptq":
        raise ConfigError(
            f"{source.directory / CONFIG_FILE}: layers differ in bits or group_size (dynamic), "
            "which AutoGPTQ cannot read. Write checkpoint_format 'gptq_v2' for GPTQModel."
        )
    symmetric = True
    for name, spec in source.layers.items():
        where = f"{source.directory}: {name}"
        for size in ("in_features", "out_features"):
            if getattr(spec, size) % 32:
                raise CheckpointError(
                    f"{where}: {size} {getattr(spec, size)} is not a multiple of 32, which stock "
                    "GPTQ needs. Quantize with this layer in modules_to_not_convert."
                )
        zeros = integer_zeros(where, source.layer(name), spec)
        if checkpoint_format == "gptq" and not zeros.all():
            raise CheckpointError(
                f"{where}: has zero-points of 0, which v1 stores as -1 and its readers decode "
                "differently. Write checkpoint_format 'gptq_v2' for GPTQModel."
            )
        symmetric = symmetric and bool((zeros == spec.mid).all())
    return symmetric


def check_specs(specs: dict[str, QuantSpec], format: str, config: QALoRAQuantConfig) -> None:
    """Refuse what `write_stock_gptq` or GPTQModel would refuse, before anything is quantized.

    Raises:
        ConfigError: an override with "gptq", a group size, or a layer's sizes.
    """
    for size in (config.group_size, *(o.get("group_size", -1) for o in config.dynamic.values())):
        if size not in GPTQMODEL_GROUP_SIZES:
            raise ConfigError(
                f"group_size {size}: GPTQModel loads stock checkpoints with one of "
                f"{list(GPTQMODEL_GROUP_SIZES)} only. Choose one of these, or use format 'qalora'"
            )
    if format == "gptq" and config.dynamic:
        raise ConfigError(
            "format 'gptq' holds one grid for all layers: leave out dynamic, or use 'gptq_v2'"
        )
    for name, spec in specs.items():
        if spec.in_features % 32 or spec.out_features % 32:
            raise ConfigError(
                f"{name} has {spec.in_features} inputs and {spec.out_features} outputs; stock GPTQ "
                "needs multiples of 32. List it in modules_to_not_convert, or use format 'qalora'"
            )


def _plan(source: QuantizedCheckpoint) -> tuple[TensorPlan, dict[str, str]]:
    """What to write, and which of it are copies of tied tensors, as {name: name in the source}."""
    plan: TensorPlan = {}
    copies = {}
    for name in source.dense_names:
        info = source.reader.info(name)
        plan[name] = (info.dtype, info.shape)
    architecture = read_architecture(source.reader.config, source.weight_names)
    # AutoGPTQ leaves what is tied and left out of the file random
    for name, original in (architecture.tied if architecture else {}).items():
        if name not in plan and original in plan:
            plan[name] = plan[original]
            copies[name] = original
    for name, spec in source.layers.items():
        n, groups = spec.out_features, spec.num_groups
        plan[f"{name}.qweight"] = (torch.int32, (spec.packed_rows, n))
        plan[f"{name}.qzeros"] = (torch.int32, (groups, n * spec.bits // 32))
        plan[f"{name}.scales"] = (spec.scales_dtype, (groups, n))
        plan[f"{name}.g_idx"] = (torch.int32, (spec.in_features,))
    return plan, copies


def _write_shard(
    source: QuantizedCheckpoint, shard: Any, names: Any, copies: dict[str, str], version: str
) -> None:
    layer: str | None = None
    parts: dict[str, torch.Tensor] = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        if part in ("qweight", "qzeros", "scales", "g_idx") and owner in source.layers:
            if owner != layer:  # a layer's tensors follow each other in the plan
                layer, parts = owner, _stock_layer(source, owner, version)
            shard.write(name, parts[part])
        else:
            shard.write_raw(name, source.reader.chunks(copies.get(name, name)))


def _stock_layer(source: QuantizedCheckpoint, name: str, version: str) -> dict[str, torch.Tensor]:
    spec, layer = source.layers[name], source.layer(name)
    zeros = integer_zeros(f"{source.directory}: {name}", layer, spec)
    g_idx = layer.g_idx
    if g_idx is None:
        g_idx = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
    return {
        "qweight": layer.qweight,
        "qzeros": pack_columns(zeros - 1 if version == "gptq" else zeros, spec.bits),
        "scales": layer.scales.to(spec.scales_dtype),
        "g_idx": g_idx,
    }


def _configs(
    source: QuantizedCheckpoint, checkpoint_format: str, symmetric: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and quantize_config.json."""
    ours = source.config
    old_3bit = ours.bits == 3 and checkpoint_format == "gptq"
    producers = [f"qalora:{__version__}"] + ([] if old_3bit else [_GPTQMODEL_COMPATIBLE])
    quantize_config = {
        "bits": ours.bits,
        "group_size": ours.group_size,
        "desc_act": ours.desc_act,
        # where GPTQModel would misread the zero-points, it refuses an asymmetric file instead
        "sym": symmetric and not old_3bit,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "damp_percent": 0.01,
        "true_sequential": True,
        "static_groups": False,
        "meta": {"quantizer": producers},
    }
    if ours.dynamic:
        quantize_config["dynamic"] = {
            f"+:^{re.escape(name)}$": {"bits": spec.bits, "group_size": spec.group_size}
            for name, spec in source.layers.items()
            if (spec.bits, spec.group_size) != (ours.bits, ours.group_size)
        }
    config = copy.deepcopy(source.reader.config)
    config["quantization_config"] = quantize_config
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False
    return config, quantize_config
