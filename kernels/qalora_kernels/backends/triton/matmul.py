"""Matrix products with packed weights on Triton.

    y[m, n]  = sum_k x[m, k] W[n, k] + bias[n]       x(M, K) -> y(M, N)
    dx[m, k] = sum_n dy[m, n] W[n, k]                dy(M, N) -> dx(M, K)

Many rows: dequantize W^T into a workspace, then cuBLAS. Few rows: fused, W is never written;
`tuning` says which, and with which blocks. Both round W to the dtype of the activations, multiply
with fp32 accumulation and round once, so they differ by the order of summation alone. One row is
the exception: its fused product does not round W at all.

The fused kernels compute y^T = W x^T: on Hopper only the left operand of a matrix instruction
comes from registers, where dequantizing leaves it. The reduction is cut into `splits` pieces whose
fp32 partial results, partial(splits, M, N), a second kernel adds in order: no atomics.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels take pointers and tiles, which have no types of Python's)

import torch
import triton
import triton.language as tl

from ...packed import PackedWeight
from . import tuning
from .dequantize import (
    dequantize,
    layer_constants,
    load_grid,
    load_unit,
    plane,
    unit_constants,
    values_per_unit,
    weight_tile,
)
from .launch import launch, workspace


@triton.jit
def _store_transposed(acc, out, bias, m, n, M, N, split):
    """Store acc [n, m] + bias as out[split, m, n]."""
    if bias is not None:
        acc += tl.load(bias + n, n < N, other=0).to(tl.float32)[:, None]
    at = (split.to(tl.int64) * M + m[None, :]) * N + n[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), (m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _accumulate(acc, weight, x, k, m, M, K, BLOCK_M: tl.constexpr):
    """Return acc [n, m] + W [n, k] x^T [k, m], W rounded to the dtype of x.

    For one row acc [n, k] keeps the products.
    """
    weight = weight.to(x.dtype.element_ty)
    if BLOCK_M == 1:
        row = tl.load(x + k, k < K, other=0)
        return acc + weight.to(tl.float32) * row.to(tl.float32)[None, :]
    else:
        rows = tl.load(
            x + m.to(tl.int64)[None, :] * K + k[:, None],
            (k < K)[:, None] & (m < M)[None, :],
            other=0,
        )
        return tl.dot(weight, rows, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M", "STEPS"])  # they change often and no address gains by them
def _linear_kernel(
    x,
    qweight,
    scales,
    offsets,
    g_idx,
    bias,
    out,
    M,
    N,
    K,
    STEPS,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    VALUES: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WHOLE_UNITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Make BLOCK_OUT outputs n of BLOCK_M rows; a step takes BLOCK_IN units, plane by plane."""
    n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    grid = (scales, offsets, g_idx)
    column = n[:, None]
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN if BLOCK_M == 1 else BLOCK_M], tl.float32)
    for step in range(split * STEPS, split * STEPS + STEPS):
        unit = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        first = (unit * VALUES)[None, :]
        if ONE_GROUP:
            mask = (first < K) & (column < N)
            words = load_unit(qweight, unit[None, :], column, mask, N, BITS)
            scale, offset = load_grid(grid, first, column, N, K, GROUP_SIZE, ACT_ORDER)
            if BLOCK_M == 1:
                # Sums of code * x, scaled once a unit: three instructions a weight. Forming W,
                # rounding it to the dtype of x and multiplying take six, more than a GPU can issue
                # in the time that it takes to read 4 bits. For the same reason x is loaded without
                # an eviction policy here and above: to keep it in the cache takes five more.
                products = tl.zeros_like(acc)
                pooled = first.to(tl.float32) * 0
                for j in tl.static_range(VALUES):
                    inside = (first if WHOLE_UNITS else first + j) < K
                    row = tl.load(x + first + j, inside, other=0).to(tl.float32)
                    products += plane(words, j, BITS, N >> 31) * row
                    pooled += row
                acc = acc + products * scale + pooled * offset
            else:
                for j in tl.static_range(VALUES):
                    weight = plane(words, j, BITS, N >> 31) * scale + offset
                    acc = _accumulate(acc, weight, x, unit * VALUES + j, m, M, K, BLOCK_M)
        else:  # unrolled, the scales of every plane would not fit in shared memory
            for j in range(VALUES):
                k = first + j
                weight = weight_tile(qweight, grid, k, column, N, K, BITS, GROUP_SIZE, ACT_ORDER)
                acc = _accumulate(acc, weight, x, unit * VALUES + j, m, M, K, BLOCK_M)
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=1)[:, None]
    _store_transposed(acc, out, bias, m, n, M, N, split)


@triton.jit(do_not_specialize=["M", "STEPS"])
def _grad_input_kernel(
    dy,
    qweight,
    scales,
    offsets,
    g_idx,
    bias,
    out,
    M,
    N,
    K,
    STEPS,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Make BLOCK_OUT inputs k of BLOCK_M rows; a step takes BLOCK_IN columns n.

    bias is None: the signature is `_linear_kernel`'s.
    """
    k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    grid = (scales, offsets, g_idx)
    acc = tl.zeros([BLOCK_OUT, BLOCK_M], tl.float32)
    for step in range(split * STEPS, split * STEPS + STEPS):
        n = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        weight = weight_tile(
            qweight, grid, k[:, None], n[None, :], N, K, BITS, GROUP_SIZE, ACT_ORDER
        )
        rows = tl.load(
            dy + m.to(tl.int64)[None, :] * N + n[:, None],
            (n < N)[:, None] & (m < M)[None, :],
            other=0,
        )
        acc = tl.dot(weight.to(dy.dtype.element_ty), rows, acc, input_precision="ieee")
    _store_transposed(acc, out, bias, m, k, M, K, split)


@triton.jit(do_not_specialize=["SPLITS"])
def _sum_splits_kernel(partial, bias, out, SPLITS, total, N, BLOCK: tl.constexpr):
    """Add partial(SPLITS, M*N) up, in order, and the bias: out(M*N)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < total
    acc = tl.zeros([BLOCK], tl.float32)
    piece = partial + at
    for _ in range(SPLITS):
        acc += tl.load(piece, mask, other=0)
        piece += total
    if bias is not None:
        acc += tl.load(bias + at % N, mask, other=0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask)


def _fused(
    kernel: object,
    plan: tuning.Plan,
    rows: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    outputs: int,
    reduction: int,
    constants: dict[str, int | bool],
) -> torch.Tensor:
    """Run a fused kernel over `reduction` elements in `plan.splits` pieces, then add them up."""
    m, spec = rows.shape[0], weight.spec
    out = rows.new_empty(m, outputs)
    blocks_out, blocks_m = triton.cdiv(outputs, plan.block_out), triton.cdiv(m, plan.block_m)
    blocks_in = triton.cdiv(reduction, plan.block_in)
    warps = blocks_out * blocks_m * plan.num_warps
    splits = plan.splits or tuning.splits_to_fill(rows.device, warps)
    steps = triton.cdiv(blocks_in, splits)
    splits = triton.cdiv(blocks_in, steps)  # the last piece may be short, none is empty

    blocks = {"BLOCK_M": plan.block_m, "BLOCK_OUT": plan.block_out, "BLOCK_IN": plan.block_in}
    constants = constants | blocks | {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    programs, sizes = (blocks_out, blocks_m, splits), (m, spec.out_features, spec.in_features)

    def run(target: torch.Tensor, kernel_bias: torch.Tensor | None) -> None:
        arguments = (rows, *weight.tensors, kernel_bias, target, *sizes, steps)
        launch(kernel, programs, *arguments, **constants)

    if splits == 1:
        run(out, bias)
        return out
    with workspace((splits, m, outputs), torch.float32, rows.device) as partial:
        run(partial, None)  # the second pass adds the bias
        arguments = (partial, bias, out, splits, m * outputs, outputs)
        launch(_sum_splits_kernel, (triton.cdiv(m * outputs, 1024),), *arguments, BLOCK=1024)
    return out


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N] in the dtype of x [M, K]."""
    k, n = weight.spec.in_features, weight.spec.out_features

    def run(plan: tuning.Plan) -> torch.Tensor:
        if plan.fused:
            units = triton.cdiv(k, values_per_unit(weight.spec.bits))
            return _fused(_linear_kernel, plan, x, weight, bias, n, units, unit_constants(weight))
        with workspace((k, n), x.dtype, x.device) as dense:
            dequantize(weight, dense)
            return torch.mm(x, dense) if bias is None else torch.addmm(bias.to(x.dtype), x, dense)

    return run(tuning.plan("linear", x, weight, run))


def grad_input(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return dy W [M, K] in the dtype of dy [M, N]."""
    k, n = weight.spec.in_features, weight.spec.out_features

    def run(plan: tuning.Plan) -> torch.Tensor:
        if plan.fused:
            return _fused(_grad_input_kernel, plan, dy, weight, None, k, n, layer_constants(weight))
        with workspace((k, n), dy.dtype, dy.device) as dense:
            return torch.mm(dy, dequantize(weight, dense).t())

    return run(tuning.plan("grad_input", dy, weight, run))
