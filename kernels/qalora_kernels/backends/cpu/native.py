"""Typed calls of the compiled functions, for what `dequantizes` and `multiplies` say they serve.

Tensors are on the CPU and have the shapes that `checks` asks for; they are made contiguous here.
A call costs some microseconds, and ctypes releases the GIL while it runs.
"""

import ctypes
from typing import Any

import torch

from ...packed import PackedWeight
from .build import library

_ROWS, _PARTS = 4, 8  # ROWS and PARTS of multiply.c

_DTYPES = (torch.float32, torch.bfloat16)
_GRAIN = 1 << 15  # elements worth a thread


class _Layer(ctypes.Structure):
    """`Layer` of layer.h: a view of a `PackedWeight`, which keeps what it points into alive."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "scales", "offsets", "g_idx")),
        *((name, ctypes.c_int64) for name in ("bits", "group_size", "in_features")),
        *((name, ctypes.c_int64) for name in ("out_features", "scales_fp16", "offsets_fp16")),
    ]

    def __init__(self, weight: PackedWeight):
        grid = [
            (values if values.dtype == torch.float16 else values.float()).contiguous()
            for values in (weight.scales, weight.offsets)
        ]
        g_idx = None if weight.g_idx is None else weight.g_idx.contiguous()
        self.kept = (weight.qweight.contiguous(), *grid, g_idx)
        halves = (values.dtype == torch.float16 for values in grid)
        super().__init__(*map(_address, self.kept), *weight.flat[4:], *halves)


def _dequantize_library() -> Any:
    # no fused multiply-add: W then has the bits of the plain PyTorch code
    return library("dequantize.c", ("-ffp-contract=off",))


def _multiply_library() -> Any:
    # -O3: 1.6 times faster than -O2 at 16 rows, since more of the unpacking is unrolled
    return library("multiply.c", ("-O3", "-ffp-contract=fast"))


def _pack_library() -> Any:
    return library("pack.c")


def dequantizes(dtype: torch.dtype) -> bool:
    """Say whether `dequantize` and `group_grad` can be called with elements of `dtype`."""
    return dtype in _DTYPES and _dequantize_library() is not None


def multiplies() -> bool:
    """Say whether `multiply` can be called."""
    return _multiply_library() is not None


def packs() -> bool:
    """Say whether `pack_halves` can be called."""
    return _pack_library() is not None


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _threads(elements: int) -> int:
    """Return as many as torch uses, for the sizes from which on it uses them."""
    return torch.get_num_threads() if elements >= _GRAIN else 1


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Write W^T to `out` [K, N] fp32 or bf16, contiguous."""
    layer, run = _Layer(weight), _dequantize_library().qalora_dequantize
    as_bf16 = out.dtype == torch.bfloat16
    run(ctypes.byref(layer), _address(out), as_bf16, _threads(out.numel()))
    return out


def group_grad(product: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the sums over each group of x^T dy [K, N], fp32 or bf16, weighted by W^T: [G, N]."""
    layer, run = _Layer(weight), _dequantize_library().qalora_group_grad
    product, is_bf16 = product.contiguous(), product.dtype == torch.bfloat16
    out = torch.zeros(weight.spec.num_groups, weight.spec.out_features)
    tensors = (_address(product), _address(out))
    run(ctypes.byref(layer), *tensors, is_bf16, _threads(product.numel()))
    return out


def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N] in the dtype of x [M, K], computed in fp32."""
    if x.dtype not in _DTYPES:
        return multiply(x.to(torch.float32), weight, bias).to(x.dtype)
    layer, run = _Layer(weight), _multiply_library().qalora_multiply
    x, is_bf16 = x.contiguous(), x.dtype == torch.bfloat16
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    (m, k), n = x.shape, weight.spec.out_features
    y = torch.empty(m, n, dtype=x.dtype)
    rows = 1 if m == 1 else _ROWS
    scratch = torch.empty(-(-m // rows) * rows * (k + k // 2 + _PARTS * n))
    tensors = (_address(x), _address(bias), _address(y))
    sizes = (is_bf16, ctypes.c_int64(m), rows, _address(scratch), _threads(k * n))
    run(ctypes.byref(layer), *tensors, *sizes)
    return y


def pack_halves(halves: torch.Tensor, out: torch.Tensor) -> None:
    """Write `packing.pack_halves` to `out` int32 [4*S, N], whose rows may lie apart."""
    n, streams, _ = halves.shape
    apart = (halves.stride(0), halves.stride(1), n, streams)
    sizes = (ctypes.c_int64(size) for size in apart)
    assert halves.stride(2) == out.stride(1) == 1
    ld, threads = ctypes.c_int64(out.stride(0)), _threads(8 * halves.numel())
    _pack_library().qalora_pack_halves(_address(halves), *sizes, _address(out), ld, threads)
