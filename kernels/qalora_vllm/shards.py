"""Which part of the checkpoint's layers a rank computes: the rules of vLLM's parallel layers.

vLLM joins some layers of a checkpoint (q, k and v; gate and up) to one, whose parts may have grids
of their own here. Some checkpoints hold such a layer joined already.
"""

from collections.abc import Iterator
from typing import Any

from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qalora_kernels import PackedWeight

ShardId = str | int | tuple[int, ...] | None

_QKV = {"q": 0, "k": 1, "v": 2}


def stored_sizes(layer: Any) -> list[int]:
    """Return the outputs of each part of a layer as a checkpoint holds it, over all ranks."""
    if isinstance(layer, QKVParallelLinear):  # its own `output_sizes` repeat heads that ranks share
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        widths = (layer.head_size, layer.head_size, layer.v_head_size)
        return [count * width for count, width in zip(heads, widths, strict=True)]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def parts_of(layer: Any, shard_id: ShardId) -> list[int]:
    """Return the parts of a layer, by number, that one layer of the checkpoint fills.

    Args:
        layer: vLLM's layer.
        shard_id: what vLLM loads: "q", "k" or "v", a number, several that are stored as one layer,
            or None for all of them.

    Raises:
        ValueError: vLLM joins the parts in a way that is not known here.
    """
    known = range(len(stored_sizes(layer)))
    if shard_id is None:
        parts = list(known)
    elif isinstance(shard_id, tuple):
        parts = list(shard_id)
    else:
        parts = [_QKV.get(shard_id, -1) if isinstance(shard_id, str) else shard_id]
    if len(known) != len(layer.output_partition_sizes) or not set(parts) <= set(known):
        raise ValueError(
            f"{layer.prefix}: {type(layer).__name__} with part {shard_id!r} is not supported for "
            "layers quantized by qalora."
        )
    return parts


def own_inputs(layer: Any) -> tuple[int, int] | None:
    """Return which inputs of a layer this rank computes, from and up to; None for all of them."""
    if not isinstance(layer, RowParallelLinear) or layer.tp_size == 1:
        return None
    width = layer.input_size_per_partition
    return layer.tp_rank * width, (layer.tp_rank + 1) * width


def own_columns(layer: Any, parts: list[int], name: str, found: int) -> Iterator[tuple[int, slice]]:
    """Say which outputs of a stored layer this rank computes.

    Args:
        layer: vLLM's layer.
        parts: those that the stored layer holds side by side, see `parts_of`.
        name: of the stored layer, for the message.
        found: how many outputs it has.

    Yields:
        The number of a part, and its columns.

    Raises:
        ValueError: the stored layer has another number of outputs than the model's config says.
    """
    sizes = stored_sizes(layer)
    expected = sum(sizes[part] for part in parts)
    if found != expected:
        raise ValueError(
            f"{name}.qweight: expected {expected} columns, the layer's out_features, found {found}."
            " config.json belongs to another model: restore the original one."
        )
    start = 0
    for part in parts:
        width = layer.output_partition_sizes[part]
        pieces = sizes[part] // width  # fewer than ranks where they share heads, or all of it
        first = start + layer.tp_rank * pieces // layer.tp_size * width
        yield part, slice(first, first + width)
        start += sizes[part]


def own_parts(
    layer: Any, parts: list[int], name: str, weight: PackedWeight
) -> Iterator[tuple[int, PackedWeight]]:
    """Cut out of a stored layer what this rank computes.

    Args:
        layer: vLLM's layer.
        parts: those that `weight` holds side by side, see `parts_of`.
        name: of the stored layer, for the message.
        weight: all of it.

    Yields:
        The number of a part, and its weight: some of the outputs, and of the inputs where vLLM cuts
        those.

    Raises:
        ValueError: as `own_columns`.
    """
    columns = list(own_columns(layer, parts, name, weight.spec.out_features))
    inputs = own_inputs(layer)
    if inputs is not None:
        weight = weight.inputs(*inputs)
    for part, own in columns:
        yield part, weight.columns(own)
