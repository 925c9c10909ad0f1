"""INT-n operators in plain PyTorch: any device, any float dtype. Contract: `backends.Backend`."""

import torch

from . import packing
from .groups import group_index, sum_groups
from .spec import QuantSpec

_BLOCK = 1 << 20  # weights that are dequantized at a time


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64: the dtype to compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dequantize_into(
    out: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Write W^T to `out` [K, N]: scales * (q - mid) + offsets, one rounding at the end.

    A block of inputs at a time: its fp32 temporaries stay in the cache and in the allocator.
    """
    compute = _compute_dtype(out.dtype)
    scales, offsets = scales.to(compute), offsets.to(compute)
    k, bits = spec.in_features, spec.bits
    index = group_index(g_idx, spec.group_size, k, qweight.device)
    rows = max(1, _BLOCK // spec.out_features // 32) * 32
    for start in range(0, k, rows):
        stop = min(start + rows, k)
        words = qweight[start // 32 * bits : -(-stop // 32) * bits]
        codes = packing.unpack(words, bits, stop - start).to(compute)
        codes -= spec.mid
        codes *= scales.index_select(0, index[start:stop])
        codes += offsets.index_select(0, index[start:stop])
        out[start:stop] = codes
    return out


def dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W^T [K, N] in `dtype`."""
    out = qweight.new_empty(spec.in_features, spec.out_features, dtype=dtype)
    return dequantize_into(out, qweight, scales, offsets, g_idx, spec)


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """Group sums of x [M, K] -> [M, G]."""
    if g_idx is not None or x.shape[-1] % spec.group_size:
        x_sum = x.to(_compute_dtype(x.dtype))
    else:
        x_sum = x  # one reduction, which torch accumulates in fp32 for half types by itself
    return sum_groups(x_sum, g_idx, spec.group_size, spec.num_groups).to(x.dtype)


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
