"""Checks of what reaches an operator, before any kernel is launched; the same for every backend.

`ops` calls them inside the custom ops, which torch.compile does not look into. They read shapes,
dtypes and devices only, so that no GPU is synchronised; the values of `g_idx` are read once a
tensor (see `_g_idx_range`). Non-contiguous tensors are fine: backends lay them out as they need.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .spec import QuantSpec

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ranged: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # g_idx -> (version, groups)


def _tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {_either(dtypes)}, found {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, found {tensor.device}")


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def version(tensor: torch.Tensor) -> int:
    """Count of in-place changes; tensors made under inference mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


def capturing(device: torch.device) -> bool:
    """Whether the current CUDA stream is recording a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _g_idx_range(g_idx: torch.Tensor, groups: int) -> None:
    """An index outside [0, G) would read foreign memory on a GPU. Reading it back stalls the GPU,
    so each tensor is read once and again after an in-place change. A graph that is being captured
    cannot be stalled: it repeats calls that its warm-up has checked."""
    state = (version(g_idx), groups)
    if _ranged.get(g_idx) == state or capturing(g_idx.device):
        return
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx: expected values in [0, {groups}), found {low} to {high}")
    _ranged[g_idx] = state


def groups(g_idx: torch.Tensor | None, spec: QuantSpec, device: torch.device) -> None:
    """g_idx int32 [K] with values in [0, G), or None.

    Raises:
        ValueError: dtype, shape, device or a value is wrong.
    """
    if g_idx is not None:
        _tensor("g_idx", g_idx, (spec.in_features,), (torch.int32,), device)
        _g_idx_range(g_idx, spec.num_groups)


def packed(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    g_idx: torch.Tensor | None,
    spec: QuantSpec,
) -> None:
    """qweight int32 [ceil(K/32)*bits, N]; scales, offsets [G, N] floats; one device.

    Raises:
        ValueError: naming the tensor, what was expected and what was found.
    """
    device = qweight.device
    _tensor("qweight", qweight, (spec.packed_rows, spec.out_features), (torch.int32,), device)
    grid = (spec.num_groups, spec.out_features)
    _tensor("scales", scales, grid, _FLOATS, device)
    _tensor("offsets", offsets, grid, _FLOATS, device)
    groups(g_idx, spec, device)


def rows(
    name: str, tensor: torch.Tensor, width: int, like: torch.Tensor, like_rows: bool = False
) -> None:
    """Activations or gradients [M, width] of a float dtype on the device of `like`; with
    `like_rows`, of its M and dtype too.

    Raises:
        ValueError: naming the tensor, what was expected and what was found.
    """
    matrix(name, tensor)
    m = like.shape[0] if like_rows else tensor.shape[0]
    dtypes = (like.dtype,) if like_rows else _FLOATS
    _tensor(name, tensor, (m, width), dtypes, like.device)


def bias(tensor: torch.Tensor | None, spec: QuantSpec, device: torch.device) -> None:
    """bias [N] of a float dtype, or None.

    Raises:
        ValueError: dtype, shape or device is wrong.
    """
    if tensor is not None:
        _tensor("bias", tensor, (spec.out_features,), _FLOATS, device)


def matrix(name: str, tensor: torch.Tensor) -> None:
    """Raises:
    ValueError: not 2-D.
    """
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, found shape {tuple(tensor.shape)}")


def output_dtype(dtype: torch.dtype) -> None:
    """Raises:
    ValueError: not a float dtype that weights can have.
    """
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected {_either(_FLOATS)}, found {dtype}")
