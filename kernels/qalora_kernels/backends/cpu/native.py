"""Typed calls of the compiled functions, for what `dequantizes` and `multiplies` say they serve.

Tensors are on the CPU and have the shapes that `checks` asks for; they are made contiguous here.
A call costs some microseconds, and ctypes releases the GIL while it runs.
"""

import ctypes
import functools
import struct
from typing import Any

import torch

from ...packed import PackedWeight
from .build import library

_ROWS, _PARTS = 4, 4  # ROWS and PARTS of multiply.c

_DTYPES = (torch.float32, torch.bfloat16)
_GRAIN = 1 << 15  # elements worth a thread

_LAYER = struct.Struct("4P6q")  # `Layer` of layer.h
_P, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {  # a layer is passed as the bytes of its struct
    "qalora_dequantize": (ctypes.c_char_p, _P, _INT, _INT),
    "qalora_group_grad": (ctypes.c_char_p, _P, _P, _INT, _INT),
    "qalora_multiply": (ctypes.c_char_p, _P, _P, _P, _INT, _INT64, _INT, _P, _INT),
    "qalora_pack_halves": (_P, _INT64, _INT64, _INT64, _INT64, _P, _INT64, _INT),
}


@functools.cache
def _typed(loaded: ctypes.CDLL, name: str) -> Any:
    """Return a function of a library that takes addresses and sizes as plain numbers."""
    function = getattr(loaded, name)
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function


def _layer(weight: PackedWeight) -> tuple[bytes, tuple[torch.Tensor, ...]]:
    """Return a weight as C sees it, and the tensors that have to live as long."""
    halves = [values.dtype == torch.float16 for values in (weight.scales, weight.offsets)]
    scales, offsets = (
        (values if half else values.float()).contiguous()
        for values, half in zip((weight.scales, weight.offsets), halves, strict=True)
    )
    qweight, g_idx, groups = weight.qweight.contiguous(), weight.g_idx, 0
    kept: tuple[torch.Tensor, ...] = (qweight, scales, offsets)
    if g_idx is not None:
        g_idx = g_idx.contiguous()
        groups, kept = g_idx.data_ptr(), (*kept, g_idx)
    addresses = (qweight.data_ptr(), scales.data_ptr(), offsets.data_ptr(), groups)
    return _LAYER.pack(*addresses, *weight.flat[4:], *halves), kept


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


def _threads(elements: int) -> int:
    """Return as many as torch uses, for the sizes from which on it uses them."""
    return torch.get_num_threads() if elements >= _GRAIN else 1


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Write W^T to `out` [K, N] fp32 or bf16, contiguous."""
    layer, _kept = _layer(weight)
    run = _typed(_dequantize_library(), "qalora_dequantize")
    run(layer, out.data_ptr(), out.dtype == torch.bfloat16, _threads(out.numel()))
    return out


def group_grad(product: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the sums over each group of x^T dy [K, N], fp32 or bf16, weighted by W^T: [G, N]."""
    layer, _kept = _layer(weight)
    product, is_bf16 = product.contiguous(), product.dtype == torch.bfloat16
    out = torch.zeros(weight.spec.num_groups, weight.spec.out_features)
    run = _typed(_dequantize_library(), "qalora_group_grad")
    run(layer, product.data_ptr(), out.data_ptr(), is_bf16, _threads(product.numel()))
    return out


def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N] in the dtype of x [M, K], computed in fp32."""
    if x.dtype not in _DTYPES:
        return multiply(x.to(torch.float32), weight, bias).to(x.dtype)
    layer, _kept = _layer(weight)
    x = x.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    (m, k), n = x.shape, weight.spec.out_features
    y = torch.empty(m, n, dtype=x.dtype)
    rows = 1 if m == 1 else _ROWS
    scratch = torch.empty(-(-m // rows) * rows * (k + k // 2 + _PARTS * n))
    tensors = (x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr())
    sizes = (x.dtype == torch.bfloat16, m, rows, scratch.data_ptr(), _threads(k * n))
    _typed(_multiply_library(), "qalora_multiply")(layer, *tensors, *sizes)
    return y


def pack_halves(halves: torch.Tensor, out: torch.Tensor) -> None:
    """Write `packing.pack_halves` to `out` int32 [4*S, N], whose rows may lie apart."""
    n, streams, _ = halves.shape
    assert halves.stride(2) == out.stride(1) == 1
    apart = (halves.stride(0), halves.stride(1), n, streams)
    run = _typed(_pack_library(), "qalora_pack_halves")
    run(halves.data_ptr(), *apart, out.data_ptr(), out.stride(0), _threads(8 * halves.numel()))
