"""`ShardedQuantLinear`: a `QuantLinear` of which ZeRO-3 and FSDP2 shard all that is large."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qalora_kernels import PackedWeight, QuantSpec, load_offsets, store_offsets

from .linear import QuantLinear


def pack_grid(scales: torch.Tensor, offsets: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Pack scales and offsets [G, N] as int32 [G, N], or [G, 2N] if one is stored in fp32."""
    dtype = torch.promote_types(spec.scales_dtype, spec.stored_dtype)
    stored = store_offsets(offsets, scales, spec)
    pair = torch.stack([scales.to(dtype), stored.to(dtype)], dim=-1)
    return pair.view(torch.int32).reshape(spec.num_groups, -1)


def unpack_grid(grid: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and offsets, fp32 [G, N], of what `pack_grid` made."""
    dtype = torch.promote_types(spec.scales_dtype, spec.stored_dtype)
    pair = grid.view(dtype).reshape(spec.num_groups, spec.out_features, 2)
    scales = pair[..., 0].float()
    return scales, load_offsets(pair[..., 1], scales, spec).float()


class ShardedQuantLinear(QuantLinear):
    """A `QuantLinear` that holds scales and offsets as an int32 Parameter `grid`.

    DeepSpeed and FSDP shard parameters and copy buffers whole to every rank; and DeepSpeed casts
    floating-point parameters, integers not. `scales` and `offsets` are computed when they are
    asked for.
    """

    grid: nn.Parameter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of `QuantLinear`."""
        super().__init__(*args, **kwargs)
        if self.g_idx is not None:  # on every rank, also where its numbers come from another
            self.g_idx = nn.Parameter(self.g_idx, requires_grad=False)

    def _register_grid(self, device: torch.device | str | None) -> None:
        spec = self.spec
        wide = torch.promote_types(spec.scales_dtype, spec.stored_dtype).itemsize // 2
        shape = (spec.num_groups, spec.out_features * wide)
        empty = torch.empty(shape, dtype=torch.int32, device=device)
        self.grid = nn.Parameter(empty, requires_grad=False)

    def _stored(self, weight: PackedWeight) -> dict[str, torch.Tensor]:
        stored = super()._stored(weight)
        stored["grid"] = pack_grid(stored.pop("scales"), stored.pop("offsets"), self.spec)
        return stored

    @property
    def packed(self) -> PackedWeight:
        """The layer's numbers as one value, with an fp32 grid, which has to be whole here."""
        scales, offsets = unpack_grid(self.grid, self.spec)
        return PackedWeight(self.qweight, scales, offsets, self.g_idx, self.spec)

    @property
    def scales(self) -> torch.Tensor:  # type: ignore[override]
        """The scales, fp32 [G, N]; the grid has to be whole here."""
        return unpack_grid(self.grid, self.spec)[0]

    @property
    def offsets(self) -> torch.Tensor:  # type: ignore[override]
        """The offsets, fp32 [G, N]; the grid has to be whole here."""
        return unpack_grid(self.grid, self.spec)[1]

    def _saving(
        self, scales: torch.Tensor, offsets: torch.Tensor
    ) -> AbstractContextManager[object]:
        if torch.compiler.is_compiling():
            return super()._saving(scales, offsets)
        # the backward needs both again: unpacked then, not kept by every layer until then
        places = {scales.data_ptr(): 0, offsets.data_ptr(): 1}

        def pack(tensor: torch.Tensor) -> torch.Tensor | int:
            return places.get(tensor.data_ptr(), tensor)

        def unpack(kept: Any) -> torch.Tensor:
            return unpack_grid(self.grid, self.spec)[kept] if isinstance(kept, int) else kept

        return saved_tensors_hooks(pack, unpack)
