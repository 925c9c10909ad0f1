"""Typed calls of the compiled functions, for what `dequantizes` and `multiplies` say they serve.

Tensors are on the CPU and have the shapes that `checks` asks for; they are made contiguous here.
A call costs some microseconds, and ctypes releases the GIL while it runs.
"""

import ctypes
from typing import Any

import torch

from ..spec import QuantSpec
from .build import library

ROWS = 4
"""Rows of x that share the unpacking of a weight (ROWS in multiply.c)."""

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
    return library("multiply.c", ("-ffp-contract=fast",))


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
    spec: QuantSpec,
) -> torch.Tensor:
    """x [M, K] -> x W^T [M, N] fp32, computed in fp32."""
    packed = _Packed(qweight, scales, offsets, g_idx, spec)
    m, k = x.shape
    rows = 1 if m == 1 else ROWS
    tiles = -(-m // rows)
    if rows > 1:
        x = torch.nn.functional.pad(x, (0, 0, 0, tiles * rows - m))
        x = x.view(tiles, rows, k).transpose(1, 2)
    pairs = None
    if x.dtype == torch.bfloat16:  # two of them fit into a word, for the products of such pairs
        pairs = torch.empty(tiles * (k // 2) * rows, dtype=torch.int32)
    x = x.to(torch.float32).contiguous()
    y = torch.empty(tiles * rows, spec.out_features)
    threads = _threads(k * spec.out_features)
    _multiply_library().qalora_multiply(
        packed.pointer,
        _address(x),
        _address(pairs),
        _address(y),
        ctypes.c_int64(tiles),
        rows,
        threads,
    )
    return y[:m]
