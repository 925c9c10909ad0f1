"""Checks of what reaches an operator, before any kernel is launched; the same for every backend.

`ops` calls them inside the custom ops, which torch.compile does not look into. They read shapes,
dtypes and devices only, so that no GPU is synchronised; the values of `g_idx` are read once a
tensor (see `_check_range`). Non-contiguous tensors are fine: backends lay them out as they need.
Each raises ValueError that names the tensor, what was expected and what was found.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from .packed import PackedWeight

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
    """Return the count of in-place changes; tensors made under inference mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


def capturing(device: torch.device) -> bool:
    """Say whether the current CUDA stream is recording a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _check_range(g_idx: torch.Tensor, num_groups: int) -> None:
    """Check that values are in [0, G): an index outside would read foreign memory on a GPU.

    Reading values stalls the GPU, so each tensor is read once, and again after an in-place change.
    A graph that is being captured cannot be stalled: it repeats calls that its warm-up has checked.
    """
    state = (version(g_idx), num_groups)
    if _ranged.get(g_idx) == state or capturing(g_idx.device):
        return
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= num_groups:
        raise ValueError(f"g_idx: expected values in [0, {num_groups}), found {low} to {high}")
    _ranged[g_idx] = state


def groups(
    g_idx: torch.Tensor | None, group_size: int, in_features: int, device: torch.device
) -> None:
    """Check g_idx, int32 [K] with values in [0, G) or None, and the group size."""
    if group_size < 1:
        raise ValueError(f"group_size must be positive, found {group_size}")
    if g_idx is not None:
        _tensor("g_idx", g_idx, (in_features,), (torch.int32,), device)
        _check_range(g_idx, -(-in_features // group_size))


def packed(weight: PackedWeight) -> None:
    """Check that the tensors of a weight have the spec's shapes, and are on one device."""
    spec, device = weight.spec, weight.qweight.device
    words = (spec.packed_rows, spec.out_features)
    _tensor("qweight", weight.qweight, words, (torch.int32,), device)
    grid = (spec.num_groups, spec.out_features)
    _tensor("scales", weight.scales, grid, _FLOATS, device)
    _tensor("offsets", weight.offsets, grid, _FLOATS, device)
    groups(weight.g_idx, spec.group_size, spec.in_features, device)


def rows(
    name: str, tensor: torch.Tensor, width: int, like: torch.Tensor, like_rows: bool = False
) -> None:
    """Check activations or gradients, [M, width] floats on the device of `like`.

    With `like_rows` they must have the M and dtype of `like` too.
    """
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, found shape {tuple(tensor.shape)}")
    m = like.shape[0] if like_rows else tensor.shape[0]
    dtypes = (like.dtype,) if like_rows else _FLOATS
    _tensor(name, tensor, (m, width), dtypes, like.device)


def bias(tensor: torch.Tensor | None, out_features: int, device: torch.device) -> None:
    """Check the bias, [N] floats or None."""
    if tensor is not None:
        _tensor("bias", tensor, (out_features,), _FLOATS, device)


def output_dtype(dtype: torch.dtype) -> None:
    """Check that weights can be asked for in `dtype`."""
    if dtype not in _FLOATS:
        raise ValueError(f"dtype: expected {_either(_FLOATS)}, found {dtype}")
