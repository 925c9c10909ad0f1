"""Typed calls of the compiled functions, for what `dequantizes` and `multiplies` say they serve.

Tensors are on the CPU and have the shapes that `checks` asks for; they are made contiguous here.
A call costs some microseconds, and ctypes releases the GIL while it runs.
"""

import ctypes
from typing import Any

import torch

from ..spec import QuantSpec
from .build import library

_ROWS, _PARTS = 4, 8  # ROWS and PARTS of multiply.c

_DTYPES = (torch.float32, torch.bfloat16)
_GRAIN = 1 << 15  # elements worth a thread


class _Layer(ctypes.Structure):
    """`Layer` of layer.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qweight", "scales", "offsets", "g_idx")),
        *((n, ctypes.c_int64) for n in ("bits", "group_size", "in_features", "out_features")),
        *((n, ctypes.c_int64) for n in ("scales_fp16", "offsets_fp16")),
    ]


def _dequantize_library() -> Any:
    # no fused multiply-add: W then has the bits of the plain PyTorch code
    return library("dequantize.c", ("-ffp-contract=off",))


def _multiply_library() -> Any:
    # -O3: 1.6 times faster than -O2 at 16 rows, since more of the unpacking is unrolled
    return library("multiply.c", ("-O3", "-ffp-contract=fast"))


def dequantizes(dtype: torch.dtype) -> bool:
    """Whether `dequantize` and `group_grad` can be called with elements of `dtype`."""
    return dtype in _DTYPES and _dequantize_library() is not None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `multiply` can be called with x of `dtype`."""
    return dtype != torch.float64 and _multiply_library() is not None


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _threads(elements: int) -> int:
    """As many as torch uses, for the sizes from which on it uses them."""
    return torch.get_num_threads() if elements >= _GRAIN else 1


def _grid(values: torch.Tensor) -> torch.Tensor:
    """Scales or offsets in a dtype that the compiled code reads."""
    dtype = torch.float16 if values.dtype == torch.float16 else torch.float32
    return values.to(dtype).contiguous()


class _Packed:
    """The C struct of a layer, and the contiguous tensors that it points into."""

    def __init__(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
    ):
        scales, offsets = _grid(scales), _grid(offsets)
        g_idx = None if g_idx is None else g_idx.contiguous()
        self.tensors = (qweight.contiguous(), scales, offsets, g_idx)
        sizes = (spec.bits, spec.group_size, spec.in_features, spec.out_features)
        halves = (scales.dtype == torch.float16, offsets.dtype == torch.float16)
        self.pointer = ctypes.byref(_Layer(*(_address(t) for t in self.tensors), *sizes, *halves))


def dequantize(
    out: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> None:
    """Write W^T to `out` [K, N] fp32 or bf16, contiguous."""
    packed = _Packed(qweight, scales, offsets, g_idx, spec)
    as_bf16 = out.dtype == torch.bfloat16
    threads = _threads(out.numel())
    _dequantize_library().qalora_dequantize(packed.pointer, _address(out), as_bf16, threads)


def group_grad(
    product: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """x^T dy [K, N], fp32 or bf16 -> its sums over each group, weighted by W^T: [G, N] fp32."""
    product = product.contiguous()
    packed = _Packed(qweight, scales, offsets, g_idx, spec)
    out = torch.zeros(spec.num_groups, spec.out_features)
    is_bf16 = product.dtype == torch.bfloat16
    threads = _threads(product.numel())
    _dequantize_library().qalora_group_grad(
        packed.pointer, _address(product), _address(out), is_bf16, threads
    )
    return out


def multiply(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: QuantSpec,
) -> torch.Tensor:
    """x [M, K] -> x W^T + bias [M, N] in the dtype of x, computed in fp32."""
    if x.dtype not in _DTYPES:
        y = multiply(x.to(torch.float32), qweight, scales, offsets, g_idx, bias, spec)
        return y.to(x.dtype)
    packed = _Packed(qweight, scales, offsets, g_idx, spec)
    x = x.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    (m, k), n = x.shape, spec.out_features
    y = torch.empty(m, n, dtype=x.dtype)
    rows = 1 if m == 1 else _ROWS
    threads = _threads(k * n)
    scratch = torch.empty(-(-m // rows) * rows * (k + k // 2 + _PARTS * n))
    _multiply_library().qalora_multiply(
        packed.pointer,
        _address(x),
        _address(bias),
        _address(y),
        x.dtype == torch.bfloat16,
        ctypes.c_int64(m),
        rows,
        _address(scratch),
        threads,
    )
    return y
