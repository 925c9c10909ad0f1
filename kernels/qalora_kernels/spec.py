"""`QuantSpec`: shape and grid of a quantized linear layer, without its numbers."""

from dataclasses import dataclass

import torch

SUPPORTED_BITS = (2, 3, 4, 8)
OFFSETS_AT = ("middle", "minimum")
SCALES_DTYPE = torch.float16
"""dtype of `scales` in a checkpoint, the one of the GPTQ layout."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute and accumulate in: fp32, but fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class QuantSpec:
    """Shape and grid of one quantized linear layer.

    Args:
        bits: width of the integers, one of 2, 3, 4, 8.
        group_size: inputs that share one scale and one offset; the last group may be short.
            -1 means one group for all inputs and is normalised to `in_features`.
        in_features: K.
        out_features: N.
        offsets_dtype: dtype of the offsets in memory; folding rounds to it.
        scales_dtype: likewise for the scales; checkpoints hold fp16, float64 serves exact checks.
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
    offsets_dtype: torch.dtype = torch.float16
    scales_dtype: torch.dtype = SCALES_DTYPE
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
        for name in ("offsets_dtype", "scales_dtype"):
            dtype = getattr(self, name)
            if not dtype.is_floating_point:
                raise ValueError(f"{name} must be a float dtype, found {dtype}")
        if self.offsets_at not in OFFSETS_AT:
            raise ValueError(f"offsets_at must be one of {OFFSETS_AT}, found {self.offsets_at!r}")
        if self.offsets_at == "minimum" and self.offsets_dtype.itemsize < 4:
            raise ValueError(
                "offsets_at 'minimum' needs offsets_dtype float32 (or wider), found "
                f"{self.offsets_dtype}"
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
    def stored_dtype(self) -> torch.dtype:
        """Return the dtype of a checkpoint's `offsets`, or of its minima; see `store_offsets`."""
        return self.scales_dtype if self.offsets_at == "minimum" else self.offsets_dtype

    @property
    def packed_rows(self) -> int:
        """Return the rows of `qweight`: 32 inputs take `bits` 32-bit words, the last 32 padded."""
        return -(-self.in_features // 32) * self.bits
