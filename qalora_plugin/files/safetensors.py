"""Read and check the header of one safetensors file, without touching its data.

Format: 8 bytes, little-endian header length; a JSON object {name: {dtype, shape, data_offsets}};
then the data, without holes (https://github.com/huggingface/safetensors#format).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import CheckpointError
from .inside import open_regular
from .json import parse_json

if TYPE_CHECKING:
    import torch  # a header is read and checked without it

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

# the format's names, torch's, and bytes
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
_CODES = {f"torch.{name}": code for code, (name, _) in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """The place of one tensor: `nbytes` bytes from byte `start` of `file`.

    `dtype_name` is torch's, such as "float16".
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def dtype(self) -> "torch.dtype":
        """Return the dtype, which imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def is_float(self) -> bool:
        """Whether its numbers are floats, of any width."""
        return self.dtype_name.startswith(("float", "bfloat"))


def dtype_code(dtype: "torch.dtype") -> str:
    """Return the format's name of a dtype."""
    return _CODES[str(dtype)]


def tensor_nbytes(dtype: "torch.dtype", shape: tuple[int, ...]) -> int:
    """Return the size of a dense tensor in bytes."""
    return math.prod(shape) * dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read one file's header and check it against the file's size.

    Args:
        path: a .safetensors file, or a link to one.

    Returns:
        The tensors by name, in the order of their data, and the file's `__metadata__`.

    Raises:
        CheckpointError: the file cannot be read, its header is damaged, or its data are cut short,
            overlap, or leave holes.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        raw = _read_header_bytes(file, path, size)
    entries = _parse(raw, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "__metadata__ must be an object of strings")
    data_start = LENGTH_BYTES + len(raw)
    tensors = [_tensor_info(name, entry, path, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    _check_layout(tensors, path, data_start, size)
    return {info.name: info for info in tensors}, metadata


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a valid safetensors file: {what}. Download or copy the file again."
    )


def _read_header_bytes(file: BinaryIO, path: Path, size: int) -> bytes:
    if size < LENGTH_BYTES:
        raise _damaged(path, f"expected at least {LENGTH_BYTES} bytes, found {size}")
    file.seek(0)
    length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise _damaged(
            path, f"expected a header of at most {MAX_HEADER_BYTES} bytes, found length {length}"
        )
    if LENGTH_BYTES + length > size:
        raise _damaged(
            path, f"its header says {length} bytes, but the file has {size} bytes (truncated?)"
        )
    return file.read(length)


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON, or not of tensors ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"the header must be an object, found {type(header).__name__}")
    return header


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor_info(name: str, entry: Any, path: Path, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _damaged(path, f"tensor {name}: dtype, shape or data_offsets is missing")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _damaged(path, f"tensor {name}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _damaged(path, f"tensor {name}: data_offsets {offsets!r} is not [begin, end]")
    known = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if known is None:
        raise CheckpointError(
            f"{path}: tensor {name} has dtype {entry['dtype']!r}; supported: {', '.join(DTYPES)}."
        )
    dtype_name, width = known
    nbytes = math.prod(shape) * width
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(
            path,
            f"tensor {name}: {entry['dtype']} of shape {shape} takes {nbytes} bytes, "
            f"its data_offsets {offsets} span {offsets[1] - offsets[0]}",
        )
    return TensorInfo(name, dtype_name, tuple(shape), path, data_start + offsets[0], nbytes)


def _check_layout(tensors: list[TensorInfo], path: Path, data_start: int, size: int) -> None:
    end = data_start
    for info in tensors:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "follows a hole"
            raise _damaged(path, f"tensor {info.name} {what} (byte {info.start}, expected {end})")
        end += info.nbytes
    if size < end:
        raise CheckpointError(
            f"{path}: truncated: expected {end} bytes, found {size}. "
            "Download or copy the file again."
        )
    if size > end:
        raise _damaged(path, f"expected {end} bytes, found {size}: data that no tensor owns")
