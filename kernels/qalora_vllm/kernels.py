"""How a rank's weight is multiplied: the kernels that serve it, and the choice between them.

QALORA_VLLM_KERNEL overrides the choice:

    qalora     our operators (`qalora_kernels.ops`): every grid and dtype, Triton on a GPU, C on a
               CPU; W has the bits that transformers computes
    engine     vLLM's own symmetric kernel (Marlin and the like on a GPU), for 4 and 8 bits without
               act-order in fp16 and bf16: y = x (s * (q - mid))^T + pool(x) offsets, which are
               QA-LoRA's own sums over groups (arXiv 2309.14717, eq. 5-7)
    int4pack   `torch._weight_int4pack_mm_for_cpu`, for 4 bits in bf16 on a CPU, for products of up
               to `INT4PACK_PRODUCTS`; our operators above

What a kernel cannot serve our operators do. Without the variable the choice is `_best`.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qalora_kernels import PackedWeight

ENVIRONMENT_VARIABLE = "QALORA_VLLM_KERNEL"
INT4PACK_PRODUCTS = 1 << 25
"""M*K*N up to which int4pack wins over our operators: their own cost of a call is larger."""


def join(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Put neighbours with the same grid side by side: one product instead of several."""
    joined: list[PackedWeight] = []
    for weight in weights:
        if joined and _same_grid(joined[-1], weight):
            weight = _beside(joined.pop(), weight)
        joined.append(weight)
    return joined


def _same_grid(left: PackedWeight, right: PackedWeight) -> bool:
    if replace(left.spec, out_features=1) != replace(right.spec, out_features=1):
        return False
    if left.g_idx is None or right.g_idx is None:
        return left.g_idx is right.g_idx
    return torch.equal(left.g_idx, right.g_idx)


def _beside(left: PackedWeight, right: PackedWeight) -> PackedWeight:
    pairs = zip(left.tensors[:3], right.tensors[:3], strict=True)
    qweight, scales, offsets = (torch.cat(pair, dim=1) for pair in pairs)
    width = left.spec.out_features + right.spec.out_features
    spec = replace(left.spec, out_features=width)
    return PackedWeight(qweight, scales, offsets, left.g_idx, spec)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class QALoRAKernel(nn.Module):
    """Our operators: every grid, dtype and device.

    Args:
        weight: the layer on this rank.
    """

    def __init__(self, weight: PackedWeight):
        super().__init__()
        scales = weight.scales
        if scales.dtype == torch.bfloat16:  # the C code would widen it in every call
            scales = scales.float()
        self.qweight, self.scales = _frozen(weight.qweight), _frozen(scales)
        self.offsets = _frozen(weight.offsets)
        self.g_idx = None if weight.g_idx is None else _frozen(weight.g_idx)
        self.sizes: tuple[int, ...] = weight.flat[4:]  # type: ignore[assignment]

    def scales_of(self, columns: slice) -> torch.Tensor:
        """Return the scales of some of the N outputs, [G, columns]."""
        return self.scales[:, columns]

    def update(self, part: str, columns: slice, values: torch.Tensor) -> None:
        """Replace the "scales" or "offsets" of some of the N outputs, [G, columns]."""
        getattr(self, part).data[:, columns].copy_(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T: [M, K] -> [M, N]."""
        tensors = (self.qweight, self.scales, self.offsets, self.g_idx)
        return torch.ops.qalora.linear(x, *tensors, *self.sizes, None)


def _served_by_int4pack(weight: PackedWeight, dtype: torch.dtype) -> bool:
    spec, device = weight.spec, weight.qweight.device
    return (
        device.type == "cpu"
        and (spec.bits, dtype, weight.g_idx) == (4, torch.bfloat16, None)
        and spec.group_size in (32, 64, 128, 256)  # what the operator of torch knows
        and spec.in_features % spec.group_size == 0
        and spec.out_features % 16 == 0
    )


class Int4PackKernel(QALoRAKernel):
    """torch's CPU operator for small products, our operators for large ones.

    Its scales and offsets are bf16, as its activations; it holds the integers a second time.

    Args:
        weight: 4 bits, without act-order, on the CPU.
    """

    def __init__(self, weight: PackedWeight):
        super().__init__(weight)
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 1)
        grid = torch.stack((weight.scales, weight.offsets), dim=-1).to(torch.bfloat16)
        self.packed, self.grid = _frozen(packed), _frozen(grid.contiguous())

    def update(self, part: str, columns: slice, values: torch.Tensor) -> None:
        """Replace the "scales" or "offsets" of some of the N outputs, [G, columns]."""
        super().update(part, columns, values)
        self.grid.data[:, columns, ("scales", "offsets").index(part)].copy_(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T: [M, K] -> [M, N]."""
        tensors = (self.packed, self.grid, self.qweight, self.scales, self.offsets)
        return torch.ops.qalora_vllm.int4pack_linear(x, *tensors, self.sizes[1])


def _int4pack_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    grid: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    out_features = scales.shape[1]
    if x.numel() * out_features <= INT4PACK_PRODUCTS:
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), packed, group_size, grid)
    sizes = (4, group_size, x.shape[1], out_features)
    return torch.ops.qalora.linear(x, qweight, scales, offsets, None, *sizes, None)


# One operator, so that a graph that is compiled for any number of rows keeps the choice. It is
# registered as in `qalora_kernels.ops`, since torch.library.custom_op costs more than a small
# product, and has few arguments, since each costs something too.
_LIBRARY = torch.library.Library("qalora_vllm", "DEF")
_LIBRARY.define(
    "int4pack_linear(Tensor x, Tensor packed, Tensor grid, Tensor qweight, Tensor scales, "
    "Tensor offsets, int group_size) -> Tensor"
)
_LIBRARY.impl("int4pack_linear", _int4pack_linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "qalora_vllm::int4pack_linear",
    lambda x, packed, grid, *weight: x.new_empty(x.shape[0], grid.shape[1]),
    lib=_LIBRARY,
)


class EngineKernel(nn.Module):
    """vLLM's symmetric kernel, plus pool(x) @ offsets.

    Args:
        weight: 4 or 8 bits, without act-order.
        dtype: of the activations.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype):
        super().__init__()
        from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

        kind, config = _engine_kernel(weight, dtype)  # type: ignore[misc]
        place = {"input_dim": 0, "output_dim": 1, "weight_loader": None}
        packing = {"packed_dim": 0, "packed_factor": 32 // weight.spec.bits}
        self.qweight = PackedvLLMParameter(data=weight.qweight, **packing, **place)
        self.scales = GroupQuantScaleParameter(data=weight.scales.to(dtype), **place)
        self.bias = None  # the kernels look at it
        self.offsets = _frozen(weight.offsets.to(dtype))
        self.group_size = weight.spec.group_size
        self.kernel = kind(config, "qweight", "scales", "qzeros")
        self.kernel.process_weights_after_loading(self)

    def scales_of(self, columns: slice) -> torch.Tensor:
        """Raise a ValueError: the order of the scales is the engine's own by now."""
        raise ValueError(
            "vLLM's symmetric kernel keeps scales in an order of its own. To send scales that are "
            "trained (adapt='scales' or 'both'), or minima (offsets_at='minimum'), set "
            f"{ENVIRONMENT_VARIABLE}=qalora"
        )

    def update(self, part: str, columns: slice, values: torch.Tensor) -> None:
        """Replace the "offsets" of some of the N outputs, [G, columns].

        Raises:
            ValueError: "scales", see `scales_of`.
        """
        if part == "scales":
            self.scales_of(columns)
        self.offsets.data[:, columns].copy_(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T: [M, K] -> [M, N]."""
        pooled = x.unflatten(-1, (-1, self.group_size)).sum(-1)
        return self.kernel.apply_weights(self, x) + pooled @ self.offsets


def _engine_kernel(weight: PackedWeight, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """Return vLLM's kernel for a symmetric weight of this grid, with its config, or None."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    spec = weight.spec
    types = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}
    whole = spec.in_features % spec.group_size == 0 and spec.in_features % 32 == 0
    half = dtype in (torch.float16, torch.bfloat16)
    if weight.g_idx is not None or spec.bits not in types or not (whole and half):
        return None
    shape = (spec.in_features, spec.out_features)
    config = MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=types[spec.bits],
        act_type=dtype,
        group_size=spec.group_size,
        zero_points=False,
    )
    try:
        return choose_mp_linear_kernel(config), config
    except ValueError:  # none of vLLM's serves it
        return None


def _best(weight: PackedWeight, dtype: torch.dtype) -> str:
    """Return the kernel that was the fastest."""
    return "engine" if weight.qweight.is_cuda else "int4pack"


def make_kernel(weight: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """Return the kernel of a weight, for activations in `dtype`.

    Raises:
        ValueError: QALORA_VLLM_KERNEL names no kernel.
    """
    names = ("qalora", "engine", "int4pack")
    name = os.environ.get(ENVIRONMENT_VARIABLE, "") or _best(weight, dtype)
    if name not in names:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be one of {list(names)} or unset, found {name!r}"
        )
    if name == "engine" and _engine_kernel(weight, dtype) is not None:
        return EngineKernel(weight, dtype)
    if name == "int4pack" and _served_by_int4pack(weight, dtype):
        return Int4PackKernel(weight)
    return QALoRAKernel(weight)
