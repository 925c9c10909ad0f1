"""The linear method: it takes a layer's tensors from vLLM one by one, and computes the layer.

A layer of the checkpoint is checked, cut to what this rank computes, and moved to its device as
soon as its last tensor has come, so that no more than one is held twice.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase

from qalora_kernels import PackedWeight
from qalora_kernels.stored import layer_plan

from .kernels import join, make_kernel
from .reading import DAMAGED, needed, read_layer
from .shards import ShardId, own_inputs, own_parts, parts_of
from .updates import GRID, GridUpdates

if TYPE_CHECKING:
    from .config import QALoRAVLLMConfig


class _Arriving:
    """The tensors of one of vLLM's layers, while they are loaded.

    Args:
        config: of the checkpoint.
        layer: vLLM's layer.
    """

    def __init__(self, config: "QALoRAVLLMConfig", layer: Any):
        self.config, self.layer = config, layer
        self.weights: dict[int, PackedWeight] = {}
        """What this rank computes, by the number of the part."""
        self.groups: torch.Tensor | None = None
        """Rows of the stored scales and offsets that this rank has, where it has not all."""
        self._tensors: dict[ShardId, dict[str, torch.Tensor]] = {}

    def take(
        self, part: str, parameter: nn.Parameter, tensor: torch.Tensor, shard_id: ShardId = None
    ) -> None:
        """Take one tensor of the checkpoint; vLLM calls it with the placeholder that it is for."""
        tensors = self._tensors.setdefault(shard_id, {})
        tensors[part] = tensor
        if needed(self.config.stored) <= tensors.keys():
            self._finish(shard_id, parameter.device)

    def _finish(self, shard_id: ShardId, device: torch.device) -> None:
        tensors = self._tensors.pop(shard_id)
        parts, name = parts_of(self.layer, shard_id), self.name(shard_id)
        weight = read_layer(name, tensors, self.config.stored, self.layer.input_size)
        if (inputs := own_inputs(self.layer)) is not None:
            self.groups = weight.groups_of(*inputs)[0]
        for part, own in own_parts(self.layer, parts, name, weight):
            qweight = own.qweight.to(device).contiguous()
            grid = (own.scales, own.offsets)  # these change in place: never the loader's own
            scales, offsets = (t.contiguous().to(device, copy=True) for t in grid)
            g_idx = None if own.g_idx is None else own.g_idx.to(device)
            self.weights[part] = PackedWeight(qweight, scales, offsets, g_idx, own.spec)

    def name(self, shard_id: ShardId) -> str:
        """Return the name of the checkpoint's layer that holds a part."""
        names = self.config.layer_names(self.layer.prefix)
        parts = parts_of(self.layer, shard_id)
        if shard_id is None or len(parts) > 1 or parts[0] >= len(names):
            return str(self.layer.prefix)
        return names[parts[0]]

    def all(self) -> list[PackedWeight]:
        """Return the weights of all parts, in their order.

        Raises:
            ValueError: a tensor has not come. The message names it.
        """
        for shard_id, tensors in self._tensors.items():
            read_layer(self.name(shard_id), tensors, self.config.stored, self.layer.input_size)
        parts = range(len(self.layer.output_partition_sizes))
        missing = [part for part in parts if part not in self.weights]
        if missing:
            names = self.config.layer_names(self.layer.prefix)
            name = names[missing[0]] if len(names) == len(parts) else self.layer.prefix
            read_layer(name, {}, self.config.stored, self.layer.input_size)
        self._check_bias()
        return [self.weights[part] for part in parts]

    def _check_bias(self) -> None:
        """Raise where the model has a bias that the checkpoint lacks: vLLM leaves it random."""
        tensors = self.config.tensors
        if self.layer.bias is None:
            return
        for name in (self.layer.prefix, *self.config.layer_names(self.layer.prefix)):
            if f"{name}.qweight" in tensors and f"{name}.bias" not in tensors:
                raise ValueError(f"{name}.bias is missing. {DAMAGED}")


class QALoRALinearMethod(LinearMethodBase):
    """Computes linear layers of packed integers with real-valued offsets.

    Args:
        config: of the checkpoint.
    """

    def __init__(self, config: "QALoRAVLLMConfig"):
        self.config = config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register a placeholder for each of a layer's tensors, through which they come."""
        stored = self.config.stored
        layer.output_partition_sizes = output_partition_sizes
        layer.qalora_arriving = _Arriving(self.config, layer)
        layer.qalora_dtype = params_dtype
        spec = stored.spec_for(layer.prefix, input_size, 1)
        for name, (dtype, _) in layer_plan("", spec, stored.desc_act).items():
            placeholder = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            part = name.removeprefix(".")
            loader = functools.partial(layer.qalora_arriving.take, part)
            placeholder.weight_loader = loader  # type: ignore[attr-defined]
            layer.register_parameter(part, placeholder)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the layer's kernels, one for each grid, in the place of the integers.

        From now on vLLM's `load_weights` replaces scales and offsets, see `updates`.

        Raises:
            ValueError: the layer is incomplete. The message names the tensor.
        """
        if layer.qalora_arriving is None:
            return
        arriving = layer.qalora_arriving
        weights = join(arriving.all())
        layer.qalora_arriving = None
        for part in needed(self.config.stored) - set(GRID):
            delattr(layer, part)
        dtype = layer.qalora_dtype
        layer.qalora = nn.ModuleList(make_kernel(weight, dtype) for weight in weights)
        layer.qweight = layer.qalora[0].qweight  # LoRA asks it for the device
        updates = GridUpdates(self.config.stored, layer, arriving.name, arriving.groups)
        for part in GRID:  # the placeholders stay, and take what a training sends
            getattr(layer, part).weight_loader = functools.partial(updates.take, part)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W^T + bias: [..., K] -> [..., N], in the dtype of x."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [kernel(rows) for kernel in layer.qalora]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        if bias is not None:
            y = y + bias
        return y.reshape(*x.shape[:-1], y.shape[-1])
