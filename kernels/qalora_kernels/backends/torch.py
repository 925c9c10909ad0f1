"""INT-n operators in plain PyTorch: any device, any float dtype. Contract: `backends`."""

from collections.abc import Iterator

import torch

from .. import packing
from ..groups import group_index, sum_groups
from ..packed import PackedWeight
from ..spec import QuantSpec, wide

_BLOCK = 1 << 20  # weights that are dequantized at a time


def _blocks(spec: QuantSpec) -> Iterator[tuple[int, int]]:
    """Yield ranges of inputs, from a multiple of 32 on: what is made of them stays in the cache."""
    rows = max(1, _BLOCK // spec.out_features // 32) * 32
    for start in range(0, spec.in_features, rows):
        yield start, min(start + rows, spec.in_features)


def _group_index(weight: PackedWeight) -> torch.Tensor:
    spec = weight.spec
    return group_index(weight.g_idx, spec.group_size, spec.in_features, weight.qweight.device)


def _dequantize_block(
    out: torch.Tensor, start: int, weight: PackedWeight, index: torch.Tensor
) -> torch.Tensor:
    """Write W^T of the inputs from `start` on to `out`; `index` [K] is the group of each input."""
    bits, compute = weight.spec.bits, wide(out.dtype)
    stop = start + out.shape[0]
    words = weight.qweight[start // 32 * bits : -(-stop // 32) * bits]
    codes = packing.unpack(words, bits, stop - start).to(compute)
    codes -= weight.spec.mid
    codes *= weight.scales.index_select(0, index[start:stop]).to(compute)
    codes += weight.offsets.index_select(0, index[start:stop]).to(compute)
    return out.copy_(codes)


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Write W^T to `out` [K, N]: scales * (q - mid) + offsets, one rounding at the end."""
    index = _group_index(weight)
    for start, stop in _blocks(weight.spec):
        _dequantize_block(out[start:stop], start, weight, index)
    return out


def _dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    shape = (weight.spec.in_features, weight.spec.out_features)
    return dequantize(weight, weight.qweight.new_empty(shape, dtype=dtype))


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Return group sums of x [M, K], [M, G]."""
    # of whole groups in order it is one reduction, which torch accumulates in fp32 by itself
    whole = g_idx is None and x.shape[-1] % group_size == 0
    return sum_groups(x if whole else x.to(wide(x.dtype)), g_idx, group_size).to(x.dtype)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N]."""
    dense = _dense(weight, x.dtype)
    return x @ dense if bias is None else torch.addmm(bias.to(x.dtype), x, dense)


def grad_input(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return dy W [M, K]."""
    return dy @ _dense(weight, dy.dtype).t()


def _matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b accumulated in fp32 (fp64 for fp64).

    fp16 is upcast: a sum over tokens can pass 65504; bf16 cannot, and its matrix product already
    accumulates in fp32.
    """
    if a.dtype == torch.float16:
        a, b = a.float(), b.float()
    return (a @ b).to(wide(a.dtype))


def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Return pool(x)^T dy: [M, N], [M, G] -> [G, N]."""
    return _matmul_fp32(pooled.t(), dy)


def weighted_group_grad(dy: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> [G, N].

    A block of inputs at a time: x^T dy as a whole would be the layer once more, in fp32.
    """
    spec, index = weight.spec, _group_index(weight).long()
    shape = (spec.num_groups, spec.out_features)
    out = dy.new_zeros(shape, dtype=wide(dy.dtype))
    for start, stop in _blocks(spec):
        product = _matmul_fp32(x[:, start:stop].t(), dy)
        block = product.new_empty(product.shape)
        product *= _dequantize_block(block, start, weight, index)
        out.index_add_(0, index[start:stop], product)
    return out
