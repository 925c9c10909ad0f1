"""Write a model as a directory of safetensors, one layer in memory at a time.

A format says how such a directory holds one quantized layer (`DenseLayers`, and what derives from
it); `write_directory` does the rest.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.layout import TensorPlan
from ..checkpoint.side_files import copy_side_files
from ..files.atomic import AtomicDirectory
from ..files.json import write_json
from ..files.names import CONFIG_FILE
from ..files.safetensors import TensorInfo
from ..files.writer import DEFAULT_METADATA, CheckpointWriter, ShardWriter, split_plan
from .export import Progress


def regroup(per_group: torch.Tensor, spec: QuantSpec, block: int) -> torch.Tensor:
    """Repeat each group's number for the smaller blocks that it is cut into: [N, ceil(K / block)].

    Args:
        per_group: [G, N], scales or offsets of groups of neighbouring inputs.
        spec: the layer's grid.
        block: a divisor of the group size, or anything if there is one group.
    """
    repeated = per_group.repeat_interleave(-(-spec.group_size // block), dim=0)
    return repeated[: -(-spec.in_features // block)].t().contiguous()


def dense_weight(weight: PackedWeight) -> torch.Tensor:
    """Return W [N, K] in fp32, contiguous."""
    return weight.dequantize(torch.float32).t().contiguous()


class DenseLayers:
    """Each quantized layer of a directory as a dense weight in fp32."""

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype in which a tensor outside of quantized layers is written."""
        return info.dtype

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        """Return full names, dtypes and shapes of a layer's tensors."""
        return {f"{name}.weight": (torch.float32, (spec.out_features, spec.in_features))}

    def convert(self, name: str, weight: PackedWeight) -> dict[str, torch.Tensor]:
        """Return these tensors."""
        return {f"{name}.weight": dense_weight(weight)}


def dense_config(source: QuantizedCheckpoint) -> dict[str, Any]:
    """Return config.json without what says that the weights are quantized."""
    config = copy.deepcopy(source.reader.config)
    config.pop("quantization_config", None)
    return config


def write_directory(
    source: QuantizedCheckpoint,
    out: str | Path,
    layers: DenseLayers,
    config: dict[str, Any],
    reasons: Mapping[str, str],
    *,
    metadata: Mapping[str, str] = DEFAULT_METADATA,
    progress: Progress | None = None,
) -> Path:
    """Write a model directory: layers as `layers` converts them, everything else as it is.

    Args:
        source: the model.
        out: the directory to make, which is returned.
        layers: converts the layers.
        config: config.json to write.
        reasons: layers to write as a dense fp32 weight instead (`obstacles`).
        metadata: of the safetensors headers.
        progress: called with (tensors written, tensors in all).

    Raises:
        OutputError: the target is not empty, or cannot be written.
    """
    directory = AtomicDirectory(out)
    dense = DenseLayers()
    held = {name: dense if name in reasons else layers for name in source.layers}
    weights = WeightPlan(lambda name: held[name].convert(name, source.layer(name)))
    other = set(source.dense_names)
    for tensor in source.reader.tensors:  # in the order of the source's files
        name, _, part = tensor.rpartition(".")
        if tensor in other:
            info = source.reader.info(tensor)
            weights.tensors[tensor] = (layers.dense_dtype(info), info.shape)
        elif part == "qweight":
            weights.add_layer(name, held[name].plan(name, source.layers[name]))
    with directory as partial:
        write_weights(source, partial, weights, metadata, progress)
        copy_side_files(source.directory, partial)
        write_json(partial / CONFIG_FILE, config)
    return directory.target


@dataclass
class WeightPlan:
    """The tensors of a directory to write.

    Args:
        convert: makes a layer's tensors, by its name.
        tensors: dtype and shape of every tensor, in the order of the files.
        owners: the layer of every tensor that `convert` makes; a layer's follow each other.
        copies: the source's name of a tensor that has another name there.
    """

    convert: Callable[[str], Mapping[str, torch.Tensor]]
    tensors: TensorPlan = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    def add_layer(self, name: str, plan: TensorPlan) -> None:
        """Append the tensors of one quantized layer."""
        self.tensors.update(plan)
        self.owners.update(dict.fromkeys(plan, name))


def write_weights(
    source: QuantizedCheckpoint,
    directory: Path,
    weights: WeightPlan,
    metadata: Mapping[str, str] = DEFAULT_METADATA,
    progress: Progress | None = None,
) -> None:
    """Write all weight files of a directory; arguments are those of `write_directory`."""
    writer = CheckpointWriter(directory, split_plan(weights.tensors), metadata)
    layer: str | None = None
    parts: Mapping[str, torch.Tensor] = {}
    done = 0  # tensors
    for index, names in enumerate(writer.plans):
        with writer.shard(index) as shard:
            for name in names:
                owner = weights.owners.get(name)
                if owner is None:
                    _copy(source, weights.copies.get(name, name), shard, name, names[name][0])
                else:
                    if owner != layer:
                        layer, parts = owner, weights.convert(owner)
                    shard.write(name, parts[name])
                done += 1
                if progress is not None:
                    progress(done, len(weights.tensors))
    writer.finish()


def _copy(
    source: QuantizedCheckpoint, original: str, shard: ShardWriter, name: str, dtype: torch.dtype
) -> None:
    if source.reader.info(original).dtype == dtype:
        shard.write_raw(name, source.reader.chunks(original))
    else:
        shard.write(name, source.reader.get(original).to(dtype))
