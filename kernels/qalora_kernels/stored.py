"""What a checkpoint of ours says: config.json's `quantization_config`, and a layer's tensors.

The plugin for transformers and the one for vLLM both read checkpoints by this module.

K inputs, N outputs, G groups. Per layer `<name>`:

    <name>.qweight  int32 [ceil(K/32)*bits, N]   GPTQ's bit order, see `packing`
    <name>.scales   fp16  [G, N]                 bf16 or fp32 as scales_dtype says
    <name>.offsets  fp16  [G, N]                 fp32 with offsets_dtype "float32"; with offsets_at
                                                 "minimum" minima, in the scales' dtype:
                                                 offsets - 2^(bits-1) * scales
    <name>.g_idx    int32 [K]                    only with desc_act
    <name>.bias     as in the base               only where the base has one
    <name>.weight   fp32  [1]                    the guard

The guard makes loading without this package fail: transformers only warns of an unknown
quant_method and would fill the layers with random numbers, but a `weight` of shape [1] is a size
mismatch that it raises. Its one value is K, which the packed shape gives only up to 32.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .spec import QuantSpec

if TYPE_CHECKING:
    import torch  # what a header says is checked without it

QUANT_METHOD = "qalora"
FORMAT_VERSION = 1
OFFSETS_DTYPES = ("float16", "float32")
SCALES_DTYPES = (*OFFSETS_DTYPES, "bfloat16")

GUARD = "weight"
GUARD_DTYPE_NAME = "float32"
GUARD_BYTES = 4
QUANTIZED_TENSORS = ("qweight", "scales", "offsets", "g_idx", GUARD)

TensorPlan = dict[str, tuple["torch.dtype", tuple[int, ...]]]


def matches(name: str, entry: str) -> bool:
    """Say whether the module `name` is the one that `entry` names, or lies below it.

    `entry` is a whole name or the last parts of one, and may hold the wildcards of `fnmatch`.
    """
    patterns = (entry, f"{entry}.*", f"*.{entry}", f"*.{entry}.*")
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_excluded(name: str, entries: Iterable[str]) -> bool:
    """Say whether the module `name` is among those that `modules_to_not_convert` lists."""
    return any(matches(name, entry) for entry in entries)


@dataclass(repr=False)
class StoredConfig:
    """The keys of `quantization_config` and what they mean; who reads them checks them.

    `qalora_plugin.QALoRAQuantConfig` says what each key is for.
    """

    quant_method: str = field(default=QUANT_METHOD, init=False)
    bits: int = 4
    group_size: int = 32
    desc_act: bool = False
    offsets_dtype: str = "float16"
    modules_to_not_convert: list[str] | None = None
    dynamic: dict[str, dict[str, int]] = field(default_factory=dict)
    method: str = "rtn"
    base: dict[str, Any] = field(default_factory=dict)
    merged: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    offsets_at: str = "middle"
    scales_dtype: str = "float16"

    def version_problem(self) -> str | None:
        """Say why this release cannot read the format version, or None."""
        if self.format_version == FORMAT_VERSION:
            return None
        return (
            f"quantization_config: format_version {self.format_version!r} is not the one that "
            f"this release reads ({FORMAT_VERSION}); update qalora-plugin"
        )

    def spec_for(self, name: str, in_features: int, out_features: int) -> QuantSpec:
        """Return the grid of the module `name`, with the override of `dynamic` that matches."""
        computed = self.offsets_at == "minimum"  # from minima, which are stored; needs fp32
        override: dict[str, int] = {}
        for pattern, values in self.dynamic.items():
            if matches(name, pattern):
                override = values
        return QuantSpec(
            bits=override.get("bits", self.bits),
            group_size=override.get("group_size", self.group_size),
            in_features=in_features,
            out_features=out_features,
            offsets_dtype="float32" if computed else self.offsets_dtype,
            scales_dtype=self.scales_dtype,
            offsets_at=self.offsets_at,
        )


def layer_header(
    name: str, spec: QuantSpec, desc_act: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return a quantized layer's tensors, the bias left out: names of dtypes, and shapes."""
    grid = (spec.num_groups, spec.out_features)
    scales, offsets = spec.stored_names
    header: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.qweight": ("int32", (spec.packed_rows, spec.out_features)),
        f"{name}.scales": (scales, grid),
        f"{name}.offsets": (offsets, grid),
        f"{name}.{GUARD}": (GUARD_DTYPE_NAME, (1,)),
    }
    if desc_act:
        header[f"{name}.g_idx"] = ("int32", (spec.in_features,))
    return header


def layer_plan(name: str, spec: QuantSpec, desc_act: bool) -> TensorPlan:
    """Return the same as `layer_header` with torch's dtypes, as writers take it."""
    import torch

    header = layer_header(name, spec, desc_act)
    return {tensor: (getattr(torch, dtype), shape) for tensor, (dtype, shape) in header.items()}
