"""Write a model as a directory of safetensors, a few layers in memory at a time.

A format says how such a directory holds one quantized layer (`DenseLayers`, and what derives from
it); `write_directory` does the rest.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.groups import expand
from qalora_kernels.stored import TensorPlan

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..files.atomic import AtomicDirectory
from ..files.json import write_json
from ..files.names import CONFIG_FILE
from ..files.safetensors import TensorInfo
from ..files.writer import DEFAULT_METADATA, write_weights
from .export import Progress
from .stacks import expert_stacks


def regroup(per_group: torch.Tensor, spec: QuantSpec, block: int) -> torch.Tensor:
    """Repeat each group's number for the smaller blocks that it is cut into: [N, ceil(K / block)].

    Args:
        per_group: [G, N], scales or offsets of groups of neighbouring inputs.
        spec: the layer's grid.
        block: a divisor of the group size, or anything if there is one group.
    """
    repeated = per_group.repeat_interleave(-(-spec.group_size // block), dim=0)
    blocks = repeated[: -(-spec.in_features // block)].t()
    return blocks.clone(memory_format=torch.contiguous_format)  # also of one block: strides too


def without_zero_scales(weight: PackedWeight) -> PackedWeight:
    """Return the same W with a scale in every group, for formats that divide by it.

    A group whose scale is 0 has one weight, its offset: the scale becomes that too (1 if it is 0),
    and all codes the middle one.
    """
    empty = weight.scales == 0
    if not empty.any():
        return weight
    spec = weight.spec
    one = torch.where(weight.offsets == 0, 1.0, weight.offsets)
    codes = weight.codes()
    inside = expand(empty, weight.g_idx, spec.group_size, spec.in_features).t()
    codes = torch.where(inside, spec.mid, codes).to(torch.uint8)
    scales = torch.where(empty, one, weight.scales)
    return PackedWeight.from_codes(codes, scales, weight.offsets, weight.g_idx, spec)


def dense_weight(weight: PackedWeight) -> torch.Tensor:
    """Return W [N, K] in fp32, contiguous."""
    return weight.dequantize(torch.float32).t().contiguous()


class DenseLayers:
    """Each quantized layer of a directory as a dense weight in fp32."""

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype in which a tensor outside of quantized layers is written."""
        return info.dtype

    def changes(self, name: str) -> bool:
        """Say whether the numbers of a tensor outside of quantized layers change."""
        return False

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return such a tensor as it is written."""
        raise NotImplementedError(name)

    def stack_name(self, stack: str) -> str:
        """Return the layer that holds the experts of a stack (`stacks.expert_stacks`)."""
        raise NotImplementedError(stack)

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

    Experts become one tensor [E, ...], all of which is in memory while it is written.

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
    stacks = {layers.stack_name(name): found for name, found in expert_stacks(source).items()}
    first = {found[0]: name for name, found in stacks.items()}
    stacked = {layer for found in stacks.values() for layer in found}
    others = set(source.dense_names)
    copies = {name: (source.reader, name) for name in others if not layers.changes(name)}
    plan: TensorPlan = {}
    for tensor, info in source.reader.tensors.items():  # in the order of the source's files
        name, _, part = tensor.rpartition(".")
        if tensor in others:
            plan[tensor] = (layers.dense_dtype(info), info.shape)
        elif part == source.integers and name in first:
            one = held[name].plan(first[name], source.layers[name])
            count = len(stacks[first[name]])
            plan |= {full: (dtype, (count, *shape)) for full, (dtype, shape) in one.items()}
        elif part == source.integers and name in held and name not in stacked:
            plan |= held[name].plan(name, source.layers[name])

    def convert(name: str) -> Mapping[str, torch.Tensor]:
        if name in stacks:
            parts = [held[layer].convert(name, source.layer(layer)) for layer in stacks[name]]
            return {full: torch.stack([part[full] for part in parts]) for full in parts[0]}
        if name not in held:
            mine = [t for t in others - copies.keys() if t.rpartition(".")[0] == name]
            return {tensor: layers.changed(tensor, source.reader.get(tensor)) for tensor in mine}
        return held[name].convert(name, source.layer(name))

    with directory as partial:
        write_weights(partial, plan, copies, convert, metadata=metadata, progress=progress)
        source.write_side_files(partial)
        write_json(partial / CONFIG_FILE, config)
    return directory.target
