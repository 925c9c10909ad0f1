"""INT-n operators in plain PyTorch: any device, any float dtype. Contract: `backends.Backend`."""

from collections.abc import Iterator

import torch

from . import packing
from .groups import group_index, sum_groups
from .spec import QuantSpec

_BLOCK = 1 << 20  # weights that are dequantized at a time


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, but fp64 for fp64: the dtype to compute and accumulate in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(spec: QuantSpec) -> Iterator[tuple[int, int]]:
    """Ranges of inputs, from a multiple of 32 on: what is made of them stays in the cache."""
    rows = max(1, _BLOCK // spec.out_features // 32) * 32
    for start in range(0, spec.in_features, rows):
        yield start, min(start + rows, spec.in_features)


def _dequantize_block(
    out: torch.Tensor,
    start: int,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor,
    spec: QuantSpec,
) -> torch.Tensor:
    """Write W^T of the inputs from `start` on to `out`; `index` [K] is the group of each input."""
    compute = _compute_dtype(out.dtype)
    stop = start + out.shape[0]
    words = qweight[start // 32 * spec.bits : -(-stop // 32) * spec.bits]
    codes = packing.unpack(words, spec.bits, stop - start).to(compute)
    codes -= spec.mid
    codes *= scales.index_select(0, index[start:stop]).to(compute)
    codes += offsets.index_select(0, index[start:stop]).to(compute)
    return out.copy_(codes)


def dequantize_into(
    out: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """Write W^T to `out` [K, N]: scales * (q - mid) + offsets, one rounding at the end."""
    index = group_index(g_idx, spec.group_size, spec.in_features, qweight.device)
    for start, stop in _blocks(spec):
        _dequantize_block(out[start:stop], start, qweight, scales, offsets, index, spec)
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
    """Sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> [G, N].

    A block of inputs at a time: x^T dy as a whole would be the layer once more, in fp32.
    """
    k, n, compute = spec.in_features, spec.out_features, _compute_dtype(dy.dtype)
    index = group_index(g_idx, spec.group_size, k, dy.device).long()
    out = dy.new_zeros(spec.num_groups, n, dtype=compute)
    for start, stop in _blocks(spec):
        product = _matmul_fp32(x[:, start:stop].t(), dy)
        weight = product.new_empty(stop - start, n)
        product *= _dequantize_block(weight, start, qweight, scales, offsets, index, spec)
        out.index_add_(0, index[start:stop], product)
    return out
