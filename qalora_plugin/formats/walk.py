"""What the formats share: results, one layer's numbers in other shapes, and model directories.

A format that is a directory of safetensors says how it holds one layer (`LayerFormat`);
`write_directory` walks the checkpoint, one layer in memory at a time.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from qalora_kernels import PackedWeight, QuantSpec, unpack
from qalora_kernels.groups import expand

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.layout import TensorPlan
from ..checkpoint.side_files import copy_side_files
from ..errors import CheckpointError, ConfigError
from ..files.atomic import AtomicDirectory
from ..files.json import write_json
from ..files.names import CONFIG_FILE
from ..files.safetensors import TensorInfo
from ..files.writer import CheckpointWriter, ShardWriter, split_plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Args:
        out: the directory or file.
        format: its name.
        layers: quantized layers written as integers.
        dense: layers that the format cannot hold as integers, and why, by name.
        exactness: how far the exported weights equal the source's, in one sentence.
        measured: what an inexact export was measured to cost, see `requantize.Loss`.
    """

    out: Path
    format: str
    layers: int
    exactness: str
    dense: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "out": str(self.out)}

    def as_text(self) -> str:
        """For people."""
        whys = set(self.dense.values())
        if not self.layers and len(whys) == 1:
            return (
                f"{self.out}: {len(self.dense)} layers in format {self.format}, all of them dense "
                f"({whys.pop()}). {self.exactness}"
            )
        lines = [f"{self.out}: {self.layers} layers in format {self.format}. {self.exactness}"]
        for why in sorted(whys):
            names = [name for name, reason in self.dense.items() if reason == why]
            lines.append(f"  {len(names)} layers dense, {names[0]} the first: {why}")
        return "\n".join(lines)


def require(module: str, format: str) -> ModuleType:
    """Import an optional library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"format {format!r} needs the package {module.partition('.')[0]!r} ({error}). "
            "Install it with: pip install 'qalora-plugin[export]'"
        ) from error


def codes(layer: PackedWeight, spec: QuantSpec) -> torch.Tensor:
    """The integers of a layer, uint8 [N, K], contiguous."""
    return unpack(layer.qweight, spec.bits, spec.in_features).t().contiguous()


def regroup(per_group: torch.Tensor, spec: QuantSpec, block: int) -> torch.Tensor:
    """[G, N] -> [N, ceil(K / block)]: each group repeated for the smaller blocks it is cut into.

    Args:
        per_group: scales or offsets of groups of neighbouring inputs.
        spec: the layer's grid.
        block: a divisor of the group size.
    """
    repeated = per_group.repeat_interleave(spec.group_size // block, dim=0)
    return repeated[: -(-spec.in_features // block)].t().contiguous()


def dense(layer: PackedWeight, spec: QuantSpec) -> torch.Tensor:
    """W [N, K] in fp32, scales * (q - mid) + offsets."""
    weight = unpack(layer.qweight, spec.bits, spec.in_features).to(torch.float32) - spec.mid
    weight *= expand(layer.scales, layer.g_idx, spec.group_size, spec.in_features)
    weight += expand(layer.offsets, layer.g_idx, spec.group_size, spec.in_features)
    return weight.t().contiguous()


class LayerFormat(Protocol):
    """How a format in a directory of safetensors holds one quantized layer."""

    name: str

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Dtype to write a tensor in that is in no quantized layer."""

    def obstacle(self, spec: QuantSpec, act_order: bool) -> str | None:
        """Why the layer cannot be held as integers, or None."""

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Names, dtypes and shapes of the layer's tensors."""

    def convert(self, name: str, spec: QuantSpec, layer: PackedWeight) -> dict[str, torch.Tensor]:
        """These tensors."""


def obstacles(
    source: QuantizedCheckpoint, obstacle: Callable[[QuantSpec, bool], str | None], format: str
) -> dict[str, str]:
    """Layers that a format cannot hold as integers, and why.

    Raises:
        CheckpointError: it can hold none of them, so the export would be a dense model.
    """
    act_order = source.config.desc_act
    found = {name: obstacle(spec, act_order) for name, spec in source.layers.items()}
    reasons = {name: why for name, why in found.items() if why is not None}
    if len(reasons) == len(source.layers):
        name, why = next(iter(reasons.items()))
        raise CheckpointError(
            f"{source.directory}: format {format!r} can hold none of its layers as integers "
            f"({name}: {why}). Choose another format, or quantize with other settings."
        )
    return reasons


def dense_config(source: QuantizedCheckpoint) -> dict[str, Any]:
    """config.json without what says that the weights are quantized."""
    config = copy.deepcopy(source.reader.config)
    config.pop("quantization_config", None)
    return config


def write_directory(
    source: QuantizedCheckpoint,
    out: str | Path,
    format: LayerFormat,
    config: dict[str, Any],
    reasons: dict[str, str],
    metadata: Mapping[str, str],
    progress: Progress | None,
) -> Path:
    """Write a model directory: layers as `format` holds them, everything else as it is.

    Args:
        source: the model.
        out: the directory to make.
        format: converts the layers.
        config: config.json to write.
        reasons: layers to write as a dense fp32 weight instead (`obstacles`).
        metadata: of the safetensors headers.
        progress: called with (tensors written, tensors in all).

    Raises:
        OutputError: the target is not empty, or cannot be written.
    """
    directory = AtomicDirectory(out)
    plan, owners = _plan(source, format, reasons)
    done = 0
    with directory as partial:
        writer = CheckpointWriter(partial, split_plan(plan), metadata)
        layer: str | None = None
        parts: dict[str, torch.Tensor] = {}
        for index, names in enumerate(writer.plans):
            with writer.shard(index) as shard:
                for name in names:
                    if name not in owners:
                        _copy(source, shard, name, plan[name][0])
                    else:
                        if owners[name] != layer:  # a layer's tensors follow each other
                            layer = owners[name]
                            parts = _convert(source, format, layer, layer in reasons)
                        shard.write(name, parts[name])
                    done += 1
                    if progress is not None:
                        progress(done, len(plan))
        writer.finish()
        copy_side_files(source.directory, partial)
        write_json(partial / CONFIG_FILE, config)
    return directory.target


def _plan(
    source: QuantizedCheckpoint, format: LayerFormat, reasons: dict[str, str]
) -> tuple[TensorPlan, dict[str, str]]:
    """What to write in the order of the source's files, and the layer of each converted tensor."""
    plan: TensorPlan = {}
    owners: dict[str, str] = {}
    other = set(source.dense_names)
    for tensor in source.reader.tensors:
        if tensor in other:
            info = source.reader.info(tensor)
            plan[tensor] = (format.dense_dtype(info), info.shape)
            continue
        name, _, part = tensor.rpartition(".")
        if part != "qweight":
            continue
        spec = source.layers[name]
        if name in reasons:
            shape = (spec.out_features, spec.in_features)
            tensors: TensorPlan = {f"{name}.weight": (torch.float32, shape)}
        else:
            tensors = format.plan(name, spec)
        plan.update(tensors)
        owners.update(dict.fromkeys(tensors, name))
    return plan, owners


def _copy(source: QuantizedCheckpoint, shard: ShardWriter, name: str, dtype: torch.dtype) -> None:
    if source.reader.info(name).dtype == dtype:
        shard.write_raw(name, source.reader.chunks(name))
    else:
        shard.write(name, source.reader.get(name).to(dtype))


def _convert(
    source: QuantizedCheckpoint, format: LayerFormat, name: str, as_dense: bool
) -> dict[str, torch.Tensor]:
    spec, layer = source.layers[name], source.layer(name)
    if as_dense:
        return {f"{name}.weight": dense(layer, spec)}
    return format.convert(name, spec, layer)
