"""Dequantize on Triton: W^T [K, N] from packed words, each word read once.

    code[k, n] = bits [k*bits, (k+1)*bits) of column n of qweight read as one bit stream
    W^T[k, n]  = scales[g, n] * (code[k, n] - mid) + offsets[g, n],  g = g_idx[k] or k // group_size

qweight(ceil(K/32)*bits, N), scales(G, N), offsets(G, N), g_idx(K): row-major. A *unit* is what
holds a whole number of values: one word of 16, 8 or 4 values for 2, 4 or 8 bits, three words of 32
values for 3 bits. Plane j of a tile of units holds inputs unit * values + j, so that every shift
is a constant and no tile is ever reshaped.

scales * (code - mid) is exact in fp32 for scales that fp16 holds, so the addition and the final
conversion are the only roundings, and torch and Triton agree to the bit.
"""
# mypy: disable-error-code="no-untyped-def"
# (Triton kernels take pointers and tiles, which have no types of Python's)

import torch
import triton
import triton.language as tl

from ...packed import PackedWeight
from .launch import launch
from .tuning import untuned


@triton.jit
def centred(field, SHIFT: tl.constexpr, BITS: tl.constexpr, zero=0):
    """Return code - mid in fp32 of bits [SHIFT, SHIFT + BITS) of uint32 words, all others zero.

    With the exponent of 2^(23 - SHIFT) put above it, the word *is* the float 2^(23 - SHIFT) + code:
    one logical operation and one exact subtraction, where shifting and converting cost four. That
    it is one takes a `zero` that the compiler does not know to be 0: of the mask and the exponent
    only one can be part of the instruction, the other must be in a register.
    """
    value = (field | (((150 - SHIFT) << 23) + zero)).to(tl.float32, bitcast=True)
    return value - ((1 << (23 - SHIFT)) + (1 << (BITS - 1)))


@triton.jit
def load_unit(qweight, unit, n, mask, N, BITS: tl.constexpr):
    """Load the words of each unit as uint32: one word, or three for 3 bits."""
    at = qweight + unit.to(tl.int64) * (3 if BITS == 3 else 1) * N + n
    w0 = tl.load(at, mask, other=0, eviction_policy="evict_first").to(tl.uint32, bitcast=True)
    if BITS == 3:
        w1 = tl.load(at + N, mask, other=0, eviction_policy="evict_first")
        w2 = tl.load(at + 2 * N, mask, other=0, eviction_policy="evict_first")
        return w0, w1.to(tl.uint32, bitcast=True), w2.to(tl.uint32, bitcast=True)
    else:
        return w0, w0, w0


@triton.jit
def plane(words, j: tl.constexpr, BITS: tl.constexpr, zero=0):
    """Return code - mid of value j of each unit, fp32; `zero` as in `centred`."""
    word: tl.constexpr = j * BITS // 32
    shift: tl.constexpr = j * BITS % 32
    mask: tl.constexpr = (1 << BITS) - 1
    low = words[word]
    if shift + BITS > 32:  # straddles two words
        high = words[word + 1]
        return centred(((low >> shift) | (high << (32 - shift))) & mask, 0, BITS, zero)
    # the upper halves are shifted down, once a word, to fit the 23 bits of a float
    if shift >= 16:
        return centred((low >> 16) & (mask << (shift - 16)), shift - 16, BITS, zero)
    else:
        return centred(low & (mask << shift), shift, BITS, zero)


@triton.jit
def load_grid(grid, k, n, N, K, GROUP_SIZE: tl.constexpr, ACT_ORDER: tl.constexpr):
    """Load scale and offset of each (k, n) in fp32; 0 outside [K, N].

    `grid` is (scales, offsets, g_idx).
    """
    scales, offsets, g_idx = grid
    group = tl.load(g_idx + k, k < K, other=0) if ACT_ORDER else k // GROUP_SIZE
    mask = (k < K) & (n < N)
    at = group.to(tl.int64) * N + n
    scale = tl.load(scales + at, mask, other=0).to(tl.float32)
    offset = tl.load(offsets + at, mask, other=0).to(tl.float32)
    return scale, offset


@triton.jit
def weight_tile(
    qweight, grid, k, n, N, K, BITS: tl.constexpr, GROUP_SIZE: tl.constexpr, ACT_ORDER: tl.constexpr
):
    """Load W at any k and n that broadcast against each other, fp32, 0 outside [K, N].

    Words are read once a value (from the L1 cache, mostly): for tiles whose order the caller needs.
    """
    mask = (k < K) & (n < N)
    shift = k * BITS % 32
    at = qweight + (k * BITS // 32).to(tl.int64) * N + n
    code = tl.load(at, mask, other=0).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    if BITS == 3:
        after = tl.load(at + N, mask & (shift > 29), other=0).to(tl.uint32, bitcast=True)
        code |= after << ((32 - shift) % 32).to(tl.uint32)
    scale, offset = load_grid(grid, k, n, N, K, GROUP_SIZE, ACT_ORDER)
    weight = centred(code & ((1 << BITS) - 1), 0, BITS) * scale + offset
    return tl.where(mask, weight, 0.0)


@triton.jit
def _dequantize_kernel(
    qweight,
    scales,
    offsets,
    g_idx,
    out,
    N,
    K,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACT_ORDER: tl.constexpr,
    VALUES: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    WHOLE_UNITS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    first = unit * VALUES
    mask = (first < K) & (n < N)
    words = load_unit(qweight, unit, n, mask, N, BITS)
    grid = (scales, offsets, g_idx)
    if ONE_GROUP:
        scale, offset = load_grid(grid, first, n, N, K, GROUP_SIZE, ACT_ORDER)
    for j in tl.static_range(VALUES):
        k = first + j
        inside = mask if WHOLE_UNITS else (k < K) & (n < N)
        if not ONE_GROUP:
            scale, offset = load_grid(grid, k, n, N, K, GROUP_SIZE, ACT_ORDER)
        weight = plane(words, j, BITS, N >> 31) * scale + offset
        tl.store(out + k.to(tl.int64) * N + n, weight.to(out.dtype.element_ty), inside)


def values_per_unit(bits: int) -> int:
    """Return the values in the smallest whole number of words that holds a whole number of them."""
    return 32 if bits == 3 else 32 // bits


def layer_constants(weight: PackedWeight) -> dict[str, int | bool]:
    """Return the compile-time constants of every kernel that reads weights."""
    spec = weight.spec
    act_order = weight.g_idx is not None
    return {"BITS": spec.bits, "GROUP_SIZE": spec.group_size, "ACT_ORDER": act_order}


def unit_constants(weight: PackedWeight) -> dict[str, int | bool]:
    """Return `layer_constants`, and those of the kernels that read whole units."""
    spec, values = weight.spec, values_per_unit(weight.spec.bits)
    return {
        **layer_constants(weight),
        "VALUES": values,
        "ONE_GROUP": weight.g_idx is None and spec.group_size % values == 0,
        "WHOLE_UNITS": spec.in_features % values == 0,
    }


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Write W^T into `out` [K, N] (contiguous, fp16, bf16 or fp32) and return it."""
    k, n = out.shape
    blocks = untuned("dequantize", out.device)
    units = triton.cdiv(k, values_per_unit(weight.spec.bits))
    block_u, block_n = blocks["block_u"], blocks["block_n"]
    constants = {**unit_constants(weight), "BLOCK_U": block_u, "BLOCK_N": block_n}
    programs = (triton.cdiv(n, block_n), triton.cdiv(units, block_u))
    launch(_dequantize_kernel, programs, *weight.tensors, out, n, k, **constants)
    return out
