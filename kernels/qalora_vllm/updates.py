"""New scales and offsets for layers that are loaded: what a training sends after every step.

They come by vLLM's own `load_weights`, with the names and shapes that a checkpoint gives them, as
trainers send weights to vLLM; integers never come again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qalora_kernels import load_offsets
from qalora_kernels.stored import StoredConfig, layer_plan

from .shards import ShardId, own_columns, parts_of

GRID = ("scales", "offsets")


class GridUpdates:
    """Puts new scales and offsets into the kernels of one of vLLM's layers.

    With `offsets_at: minimum` a layer's scales have to come before its minima.

    Args:
        config: of the checkpoint.
        layer: vLLM's layer, whose kernels are `layer.qalora`.
        name_of: the name of the checkpoint's layer that holds a part.
        groups: rows of the stored tensors that this rank has; None for all.
    """

    def __init__(
        self,
        config: StoredConfig,
        layer: Any,
        name_of: Callable[[ShardId], str],
        groups: torch.Tensor | None,
    ):
        self._config, self._layer, self._name_of, self._groups = config, layer, name_of, groups

    @torch.no_grad()
    def take(
        self, kind: str, parameter: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Take the new "scales" or "offsets" of one stored layer, [G, N].

        Raises:
            ValueError: another dtype or shape than the checkpoint's, numbers that are not finite,
                or a kernel that cannot take them. The message names the tensor. The layer keeps
                what it had.
        """
        name = self._name_of(shard_id)
        columns = tensor.shape[1] if tensor.ndim == 2 else 0
        spec = self._config.spec_for(name, self._layer.input_size, max(1, columns))
        dtype, shape = layer_plan("", spec, self._config.desc_act)[f".{kind}"]
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            raise ValueError(
                f"{name}.{kind}: expected {dtype} [{shape[0]}, out_features] as in the checkpoint, "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name}.{kind}: holds NaN or infinity: the training diverged")
        for part, own in own_columns(self._layer, parts_of(self._layer, shard_id), name, columns):
            values = tensor[:, own]
            if self._groups is not None:
                values = values[self._groups.to(tensor.device)]
            kernel, place = self._place(part)
            if kind == "offsets" and spec.minimum_below is not None:
                scales = kernel.scales_of(place)
                values = load_offsets(values.to(scales.device), scales, spec)
            kernel.update(kind, place, values)

    def _place(self, part: int) -> tuple[Any, slice]:
        """Return the kernel that computes a part, and the part's columns in it."""
        widths = self._layer.output_partition_sizes
        first, width = sum(widths[:part]), widths[part]
        for kernel in self._layer.qalora:
            columns = kernel.offsets.shape[1]
            if first < columns:
                return kernel, slice(first, first + width)
            first -= columns
        raise AssertionError(f"part {part} has no kernel")
