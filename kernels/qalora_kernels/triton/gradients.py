"""Adapter gradients, summed over tokens in fp32; no atomics.

    pooled_grad[g, n]         = sum_m pool(x)[m, g] dy[m, n]                     (pool(x)^T dy)
    weighted_group_grad[g, n] = sum_{k in g} W[n, k] sum_m x[m, k] dy[m, n]      x(M, K), dy(M, N)

The second never writes the K x N product x^T dy: a program owns some groups and columns, forms the
product for a tile of their inputs, multiplies by W and sums each group's rows.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels take pointers and tiles, which have no types of Python's)

import torch
import triton
import triton.language as tl

from ..spec import QuantSpec
from .dequantize import layer_constants, weight_tile
from .launch import launch
from .pool import group_blocks, group_bounds, input_at, order_arguments
from .tuning import untuned


def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """[M, N], [M, G] -> fp32 [G, N]. A plain product: cuBLAS accumulates and returns fp32."""
    if dy.dtype == torch.float32:
        return torch.mm(pooled.t(), dy)
    if dy.device.type == "cuda":
        return torch.mm(pooled.t(), dy, out_dtype=torch.float32)
    return torch.mm(pooled.t().float(), dy.float())


@triton.jit
def _weighted_group_grad_kernel(
    dy,
    x,
    qweight,
    scales,
    offsets,
    g_idx,
    order,
    starts,
    out,
    M,
    N,
    K,
    G,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.arange(0, BLOCK_G * BLOCK_I)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_group = tl.program_id(1) * BLOCK_G
    groups = first_group + tl.arange(0, BLOCK_G)
    start, end = group_bounds(groups, starts, K, G, GROUP_SIZE, ACT_ORDER)
    longest = tl.max(end - start, axis=0)
    row_start, row_end = group_bounds(
        first_group + row // BLOCK_I, starts, K, G, GROUP_SIZE, ACT_ORDER
    )
    total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for i in range(0, longest, BLOCK_I):
        position = row_start + i + row % BLOCK_I
        inside = position < row_end
        k = input_at(position, inside, order, ACT_ORDER)
        product = tl.zeros([BLOCK_G * BLOCK_I, BLOCK_N], tl.float32)
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            x_tile = tl.load(
                x + m.to(tl.int64)[None, :] * K + k[:, None],
                inside[:, None] & (m < M)[None, :],
                other=0,
            )
            dy_tile = tl.load(
                dy + m.to(tl.int64)[:, None] * N + n[None, :],
                (m < M)[:, None] & (n < N)[None, :],
                other=0,
            )
            product = tl.dot(x_tile, dy_tile, product, input_precision="ieee")
        weight = weight_tile(
            qweight,
            scales,
            offsets,
            g_idx,
            tl.where(inside, k, K)[:, None],
            n[None, :],
            N,
            K,
            BITS,
            GROUP_SIZE,
            ACT_ORDER,
        )
        by_group = tl.reshape(product * weight, [BLOCK_G, BLOCK_I, BLOCK_N])
        total += tl.sum(by_group, axis=1)
    at = groups.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, total, (groups < G)[:, None] & (n < N)[None, :])


def weighted_group_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """[M, N], [M, K] -> fp32 [G, N]."""
    n, groups = spec.out_features, spec.num_groups
    out = dy.new_empty(groups, n, dtype=torch.float32)
    blocks = untuned("weighted_group_grad", dy.device)
    block_g, block_i = group_blocks(spec, blocks["tile"])
    launch(
        _weighted_group_grad_kernel,
        (triton.cdiv(n, blocks["block_n"]), triton.cdiv(groups, block_g)),
        dy,
        x,
        qweight,
        scales,
        offsets,
        g_idx,
        *order_arguments(g_idx, spec),
        out,
        dy.shape[0],
        n,
        spec.in_features,
        groups,
        **layer_constants(spec, g_idx),
        BLOCK_G=block_g,
        BLOCK_I=block_i,
        BLOCK_M=blocks["block_m"],
        BLOCK_N=blocks["block_n"],
    )
    return out
