"""`QuantSpec`: shape and grid of a quantized linear layer, without its numbers.

A header is checked against a spec before any tensor is read, and `qalora inspect` does no more than
that: so torch is not imported here until somebody asks for a dtype.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SUPPORTED_BITS = (2, 3, 4, 8)
OFFSETS_AT = ("middle", "minimum")
_FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes


def wide(dtype: "torch.dtype") -> "torch.dtype":
    """Return the dtype to compute and accumulate in: fp32, but fp64 for fp64."""
    import torch

    return torch.promote_types(dtype, torch.float32)


class _DType:
    """A field of a dataclass that is set to a dtype or its name, kept by name, read as a dtype."""

    def __init__(self, default: str) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"{name}_name"

    def __set__(self, instance: Any, value: "torch.dtype | str") -> None:
        instance.__dict__[self._key] = str(value).removeprefix("torch.")

    def __get__(self, instance: Any, owner: type) -> "torch.dtype":
        if instance is None:  # the dataclass asks for the default
            return self._default  # type: ignore[return-value]
        import torch

        dtype: torch.dtype = getattr(torch, instance.__dict__[self._key])
        return dtype


@dataclass(frozen=True)
class QuantSpec:
    """Shape and grid of one quantized linear layer.

    Args:
        bits: width of the integers, one of 2, 3, 4, 8.
        group_size: inputs that share one scale and one offset; the last group may be short.
            -1 means one group for all inputs and is normalised to `in_features`.
        in_features: K.
        out_features: N.
        offsets_dtype: dtype of the offsets in memory, or its name; folding rounds to it.
        scales_dtype: likewise for the scales; float64 serves exact checks.
        offsets_at: which weight of a group folding rounds. "middle": the offset itself, to
            `offsets_dtype`. "minimum": the weight at code 0, offset - mid * scale, to
            `scales_dtype`; checkpoints store that, and the offset is computed from it and needs
            fp32. W = scale * q + minimum is what formats with a 16-bit minimum store (GGUF's Q4_1).

    Raises:
        ValueError: a value is out of range.
    """

    bits: int
    group_size: int
    in_features: int
    out_features: int
    offsets_dtype: _DType = _DType("float16")
    scales_dtype: _DType = _DType("float16")
    offsets_at: str = "middle"

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ValueError(f"bits must be one of {SUPPORTED_BITS}, found {self.bits!r}")
        if self.in_features < 1 or self.out_features < 1:
            raise ValueError(
                "in_features and out_features must be positive, "
                f"found {self.in_features} and {self.out_features}"
            )
        if self.group_size == -1:
            object.__setattr__(self, "group_size", self.in_features)
        if self.group_size < 1:
            raise ValueError(f"group_size must be positive or -1, found {self.group_size}")
        for field in ("offsets_dtype", "scales_dtype"):
            name = self.__dict__[f"{field}_name"]
            if name not in _FLOATS:
                raise ValueError(f"{field} must be a float dtype, found {name}")
        if self.offsets_at not in OFFSETS_AT:
            raise ValueError(f"offsets_at must be one of {OFFSETS_AT}, found {self.offsets_at!r}")
        offsets = self.__dict__["offsets_dtype_name"]
        if self.offsets_at == "minimum" and _FLOATS[offsets] < 4:
            raise ValueError(
                f"offsets_at 'minimum' needs offsets_dtype float32 (or wider), found {offsets}"
            )

    @property
    def num_groups(self) -> int:
        """Return the number of groups, G = ceil(K / group_size)."""
        return -(-self.in_features // self.group_size)

    @property
    def mid(self) -> int:
        """Return the code whose weight is the offset itself: 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def minimum_below(self) -> int | None:
        """Return the steps from the offset down to the minimum, if that is rounded; else None."""
        return self.mid if self.offsets_at == "minimum" else None

    @property
    def stored_dtype(self) -> "torch.dtype":
        """Return the dtype of a checkpoint's `offsets`, or of its minima; see `store_offsets`."""
        return self.scales_dtype if self.offsets_at == "minimum" else self.offsets_dtype

    @property
    def stored_names(self) -> tuple[str, str]:
        """Return the names of the dtypes of a checkpoint's `scales` and `offsets`."""
        stored = "scales" if self.offsets_at == "minimum" else "offsets"
        return self.__dict__["scales_dtype_name"], self.__dict__[f"{stored}_dtype_name"]

    @property
    def packed_rows(self) -> int:
        """Return the rows of `qweight`: 32 inputs take `bits` 32-bit words, the last 32 padded."""
        return -(-self.in_features // 32) * self.bits
