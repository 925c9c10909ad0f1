"""Quantized layers of random numbers, and models that are quantized in memory."""

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_plugin.architecture.selection import linears_in_blocks
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.quantize.rtn import rtn


def quant_layer(
    bits=4,
    group_size=32,
    in_features=172,
    out_features=24,
    *,
    act_order=False,
    grid=None,
    bias=True,
    **spec,
):
    """Return a layer of random integers, scales, offsets and bias.

    Args:
        grid: dtype of scales and offsets; fp32 or fp64 so that formulas can be compared.
        spec: other fields of `QuantSpec`.
    """
    gen = torch.Generator().manual_seed(bits * 1000 + in_features)
    if grid is not None:
        spec |= {"offsets_dtype": grid, "scales_dtype": grid}
    made = QuantSpec(bits, group_size, in_features, out_features, **spec)
    shape = (made.num_groups, out_features)
    g_idx = None
    if act_order:
        order = torch.randperm(in_features, generator=gen)
        g_idx = torch.arange(in_features)[order] // made.group_size
    codes = torch.randint(1 << bits, (out_features, in_features), generator=gen, dtype=torch.uint8)
    scales = 0.005 + 0.02 * torch.rand(shape, generator=gen, dtype=torch.float64)
    scales[:, 1::2] *= -1  # as MLX has them
    offsets = 0.02 * torch.randn(shape, generator=gen, dtype=torch.float64)
    values = torch.randn(out_features, generator=gen, dtype=grid or torch.float32)
    packed = PackedWeight.from_codes(codes, scales, offsets, g_idx, made)
    return QuantLinear.from_packed(packed, values if bias else None)


def quantize(
    model,
    bits=4,
    group_size=16,
    act_order=False,
    grid=None,
):
    """Replace the linear layers of a model's blocks by their rounded weights; `grid` as above."""
    dtype = grid or torch.float16
    for index, (name, linear) in enumerate(linears_in_blocks(model).items()):
        n, k = linear.weight.shape
        spec = QuantSpec(bits, group_size, k, n, offsets_dtype=dtype, scales_dtype=dtype)
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(index))
        weight = linear.weight.detach()[:, order].float()
        found = rtn(weight, QuantSpec(bits, group_size, k, n), name=name)
        back = order.argsort()
        g_idx = (torch.arange(k) // spec.group_size)[back] if act_order else None
        codes = found.codes()[:, back]
        packed = PackedWeight.from_codes(codes, found.scales, found.offsets, g_idx, spec)
        model.set_submodule(name, QuantLinear.from_packed(packed, linear.bias))
    return model.eval()
