"""Sums over groups on Triton: pooling, and the adapter's gradients; in fp32, no atomics.

    pooled[m, g]              = sum_{k in g} x[m, k]           (arXiv 2309.14717, Algorithm 1)
    pooled_grad[g, n]         = sum_m pooled[m, g] dy[m, n]    (pool(x)^T dy)
    weighted_group_grad[g, n] = sum_{k in g} W[n, k] sum_m x[m, k] dy[m, n]      x(M, K), dy(M, N)

The inputs of group g are g*group_size, ... in order, or order[starts[g]:starts[g+1]] where g_idx
shuffles them. Every group is summed by one program in a fixed order. The last never writes the
K x N product x^T dy: a program owns some groups and columns, forms the product for a tile of their
inputs, multiplies by W and sums each group's rows.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels take pointers and tiles, which have no types of Python's)

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from ...checks import capturing, version
from ...packed import PackedWeight
from .dequantize import layer_constants, weight_tile
from .launch import launch
from .tuning import untuned

_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # g_idx -> (version, order, starts)


def _group_order(
    g_idx: torch.Tensor | None, num_groups: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the inputs sorted by group, int32 [K], and where each group starts, int32 [G + 1].

    They are kept for as long as g_idx lives, unless a CUDA graph is being captured (its memory is
    the graph's). Without g_idx there are none.
    """
    if g_idx is None:
        return None, None
    state = (version(g_idx), num_groups)
    known = _orders.get(g_idx)
    if known is not None and known[0] == state:
        return known[1:]
    groups, order = torch.sort(g_idx, stable=True)
    edges = torch.arange(num_groups + 1, device=g_idx.device, dtype=g_idx.dtype)
    starts = torch.searchsorted(groups, edges, out_int32=True)
    order = order.to(torch.int32)
    if not capturing(g_idx.device):
        _orders[g_idx] = (state, order, starts)
    return order, starts


@triton.jit
def _group_bounds(group, starts, K, G, GROUP_SIZE: tl.constexpr, ACT_ORDER: tl.constexpr):
    """Return the first position of each group and one past its last."""
    if ACT_ORDER:
        start = tl.load(starts + group, group < G, other=0)
        end = tl.load(starts + group + 1, group < G, other=0)
    else:
        start = tl.minimum(group * GROUP_SIZE, K)
        end = tl.minimum(start + GROUP_SIZE, K)
    return start, end


@triton.jit
def _pool_kernel(
    x,
    order,
    starts,
    out,
    M,
    K,
    G,
    GROUP_SIZE: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    start, end = _group_bounds(group, starts, K, G, GROUP_SIZE, ACT_ORDER)
    longest = tl.max(end - start, axis=0)
    total = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    for i in range(0, longest, BLOCK_I):
        position = start[:, None] + i + tl.arange(0, BLOCK_I)[None, :]
        inside = position < end[:, None]
        k = tl.load(order + position, inside, other=0) if ACT_ORDER else position
        at = m.to(tl.int64)[:, None, None] * K + k[None, :, :]
        value = tl.load(x + at, (m < M)[:, None, None] & inside[None, :, :], other=0)
        total += tl.sum(value.to(tl.float32), axis=2)
    at = m.to(tl.int64)[:, None] * G + group[None, :]
    mask = (m < M)[:, None] & (group < G)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def _group_blocks(group_size: int, tile: int) -> dict[str, int]:
    """Return the groups, and inputs of each at a time, of a tile of `tile` inputs, a power of 2."""
    inputs = min(triton.next_power_of_2(group_size), tile)
    return {"BLOCK_G": tile // inputs, "BLOCK_I": inputs}


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Return group sums of x [M, K], [M, G] in the dtype of x."""
    m, k = x.shape
    groups = triton.cdiv(k, group_size)
    out = x.new_empty(m, groups)
    blocks = untuned("pool", x.device)
    constants = {
        "GROUP_SIZE": group_size,
        "ACT_ORDER": g_idx is not None,
        "BLOCK_M": blocks["block_m"],
        **_group_blocks(group_size, blocks["tile"]),
    }
    programs = (triton.cdiv(m, blocks["block_m"]), triton.cdiv(groups, constants["BLOCK_G"]))
    launch(_pool_kernel, programs, x, *_group_order(g_idx, groups), out, m, k, groups, **constants)
    return out


def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Return pool(x)^T dy, [M, N], [M, G] -> fp32 [G, N]; cuBLAS accumulates and returns fp32."""
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
    grid = (scales, offsets, g_idx)
    row = tl.arange(0, BLOCK_G * BLOCK_I)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_group = tl.program_id(1) * BLOCK_G
    groups = first_group + tl.arange(0, BLOCK_G)
    start, end = _group_bounds(groups, starts, K, G, GROUP_SIZE, ACT_ORDER)
    longest = tl.max(end - start, axis=0)
    row_start, row_end = _group_bounds(
        first_group + row // BLOCK_I, starts, K, G, GROUP_SIZE, ACT_ORDER
    )
    total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    for i in range(0, longest, BLOCK_I):
        position = row_start + i + row % BLOCK_I
        inside = position < row_end
        k = tl.load(order + position, inside, other=0) if ACT_ORDER else position
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
        k = tl.where(inside, k, K)[:, None]
        weight = weight_tile(qweight, grid, k, n[None, :], N, K, BITS, GROUP_SIZE, ACT_ORDER)
        by_group = tl.reshape(product * weight, [BLOCK_G, BLOCK_I, BLOCK_N])
        total += tl.sum(by_group, axis=1)
    at = groups.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out + at, total, (groups < G)[:, None] & (n < N)[None, :])


def weighted_group_grad(dy: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> fp32 [G, N]."""
    spec, m = weight.spec, dy.shape[0]
    k, n, groups = spec.in_features, spec.out_features, spec.num_groups
    out = dy.new_empty(groups, n, dtype=torch.float32)
    blocks = untuned("weighted_group_grad", dy.device)
    constants = {
        **layer_constants(weight),
        **_group_blocks(spec.group_size, blocks["tile"]),
        "BLOCK_M": blocks["block_m"],
        "BLOCK_N": blocks["block_n"],
    }
    programs = (triton.cdiv(n, blocks["block_n"]), triton.cdiv(groups, constants["BLOCK_G"]))
    order = _group_order(weight.g_idx, groups)
    arguments = (dy, x, *weight.tensors, *order, out, m, n, k, groups)
    launch(_weighted_group_grad_kernel, programs, *arguments, **constants)
    return out
