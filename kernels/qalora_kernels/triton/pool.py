"""Pooling on Triton: sums of x over the inputs of each group (arXiv 2309.14717, Algorithm 1).

    pooled[m, g] = sum of x[m, k] over the k of group g       x(M, K) -> pooled(M, G)

The inputs of group g are g*group_size, ... in order, or order[starts[g]:starts[g+1]] where g_idx
shuffles them. Every group is summed by one program in a fixed order, in fp32: no atomics.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels take pointers and tiles, which have no types of Python's)

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from ..checks import capturing, version
from ..spec import QuantSpec
from .launch import launch
from .tuning import untuned

_orders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # g_idx -> (version, order, starts)


def group_order(g_idx: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs sorted by group, int32 [K], and where each group starts, int32 [G + 1]; kept for as
    long as g_idx lives, unless a CUDA graph is being captured (its memory is the graph's)."""
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
def group_bounds(group, starts, K, G, GROUP_SIZE: tl.constexpr, ACT_ORDER: tl.constexpr):
    """First position of each group and one past its last."""
    if ACT_ORDER:
        start = tl.load(starts + group, group < G, other=0)
        end = tl.load(starts + group + 1, group < G, other=0)
    else:
        start = tl.minimum(group * GROUP_SIZE, K)
        end = tl.minimum(start + GROUP_SIZE, K)
    return start, end


@triton.jit
def input_at(position, inside, order, ACT_ORDER: tl.constexpr):
    """Which input stands at a position."""
    if ACT_ORDER:
        return tl.load(order + position, inside, other=0)
    else:
        return position


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
    start, end = group_bounds(group, starts, K, G, GROUP_SIZE, ACT_ORDER)
    longest = tl.max(end - start, axis=0)
    total = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    for i in range(0, longest, BLOCK_I):
        position = start[:, None] + i + tl.arange(0, BLOCK_I)[None, :]
        inside = position < end[:, None]
        k = input_at(position, inside, order, ACT_ORDER)
        at = m.to(tl.int64)[:, None, None] * K + k[None, :, :]
        value = tl.load(x + at, (m < M)[:, None, None] & inside[None, :, :], other=0)
        total += tl.sum(value.to(tl.float32), axis=2)
    at = m.to(tl.int64)[:, None] * G + group[None, :]
    mask = (m < M)[:, None] & (group < G)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


def group_blocks(spec: QuantSpec, tile: int) -> tuple[int, int]:
    """(groups, inputs of each at a time) that make a tile of `tile` inputs, a power of 2."""
    inputs = min(triton.next_power_of_2(spec.group_size), tile)
    return tile // inputs, inputs


def order_arguments(
    g_idx: torch.Tensor | None, spec: QuantSpec
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(order, starts) where g_idx shuffles the groups."""
    return (None, None) if g_idx is None else group_order(g_idx, spec.num_groups)


def pool(x: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    """x [M, K] -> [M, G] in the dtype of x."""
    m, groups = x.shape[0], spec.num_groups
    out = x.new_empty(m, groups)
    blocks = untuned("pool", x.device)
    block_g, block_i = group_blocks(spec, blocks["tile"])
    launch(
        _pool_kernel,
        (triton.cdiv(m, blocks["block_m"]), triton.cdiv(groups, block_g)),
        x,
        *order_arguments(g_idx, spec),
        out,
        m,
        spec.in_features,
        groups,
        GROUP_SIZE=spec.group_size,
        ACT_ORDER=g_idx is not None,
        BLOCK_M=blocks["block_m"],
        BLOCK_G=block_g,
        BLOCK_I=block_i,
    )
    return out
