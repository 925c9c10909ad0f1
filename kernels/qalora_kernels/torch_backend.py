"""INT-n operators in plain PyTorch: any device, any float dtype. Contract: `backends.Backend`."""

import torch

from . import packing
from .groups import expand, group_index, sum_groups
from .spec import QuantSpec


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64: the dtype to compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W^T [K, N] in `dtype`: scales * (q - mid) + offsets, one rounding at the end."""
    compute = _compute_dtype(dtype)
    k, size = spec.in_features, spec.group_size
    codes = packing.unpack(qweight, spec.bits, k).to(compute)
    codes -= spec.mid
    codes *= expand(scales.to(compute), g_idx, size, k)
    codes += expand(offsets.to(compute), g_idx, size, k)
    return codes.to(dtype)


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Group sums of x [M, K] -> [M, G]."""
    sums = sum_groups(x.to(_compute_dtype(x.dtype)), g_idx, spec.group_size, spec.num_groups)
    return sums.to(x.dtype)


def linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """x [M, K] -> x W^T + bias [M, N]."""
    weight = dequantize(qweight, scales, offsets, g_idx, spec, x.dtype)
    if bias is None:
        return x @ weight
    return torch.addmm(bias.to(x.dtype), x, weight)


def grad_input(
    dy: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """dy [M, N] -> dy W [M, K]."""
    return dy @ dequantize(qweight, scales, offsets, g_idx, spec, dy.dtype).t()


def _matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b accumulated in fp32 (fp64 for fp64). fp16 is upcast: a sum over tokens can pass 65504;
    bf16 cannot, and its matrix product already accumulates in fp32."""
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return (a @ b).to(_compute_dtype(a.dtype))


def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """[M, N], [M, G] -> pool(x)^T dy, [G, N]."""
    return _matmul_fp32(pooled.t(), dy)


def weighted_group_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> [G, N]."""
    product = _matmul_fp32(x.t(), dy)
    product *= dequantize(qweight, scales, offsets, g_idx, spec, product.dtype)
    out = product.new_zeros(spec.num_groups, spec.out_features)
    index = group_index(g_idx, spec.group_size, spec.in_features, dy.device)
    return out.index_add_(0, index.long(), product)
