"""`QALoRAQuantConfig`: how a base is quantized, as config.json's `quantization_config` says it."""

from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qalora_kernels import OFFSETS_AT, SUPPORTED_BITS, QuantSpec

from ..architecture.names import is_excluded, matches
from ..errors import ConfigError

QUANT_METHOD = "qalora"
FORMAT_VERSION = 1
OFFSETS_DTYPES = {"float16": torch.float16, "float32": torch.float32}
METHODS = ("rtn", "gptq")
_LAYER_KEYS = {"bits", "group_size"}


def _check_grid(where: str, bits: Any, group_size: Any) -> None:
    if type(bits) is not int or bits not in SUPPORTED_BITS:
        raise ConfigError(f"{where}bits must be one of {SUPPORTED_BITS}, found {bits!r}")
    valid = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not valid or (group_size != -1 and group_size < 1):
        raise ConfigError(
            f"{where}group_size must be a positive integer, or -1 for one group per output, "
            f"found {group_size!r}"
        )


class QALoRAQuantConfig(QuantizationConfigMixin):
    """`quantization_config` of an INT-n base with real-valued offsets.

    Give it to `from_pretrained` to quantize a 16-bit base while it loads (data-free); `qalora
    quantize` does it better, with calibration. In a checkpoint it says how to read the tensors.

    Args:
        bits: width of the integers: 2, 3, 4 or 8.
        group_size: inputs that share a scale and an offset; -1 for one group per output.
        desc_act: groups follow a `g_idx` tensor (act-order) instead of k // group_size; only in a
            checkpoint, as their order comes from calibration data.
        offsets_dtype: of the `offsets` tensors: "float16", or "float32" where a stock GPTQ base's
            scales * (mid - zero) must be held exactly.
        modules_to_not_convert: modules that stay unquantized, with all that is below them: names,
            the last parts of names ("down_proj", "mlp"), or patterns (*, ?). Output embeddings and
            other heads always do.
        dynamic: other `bits` and `group_size` for some modules: {name, its last parts, or pattern:
            {...}}; the last one that matches counts.
        method: "rtn" or "gptq": how the integers were found; while loading, "rtn" only.
        base: where the integers came from (name, revision, calibration, seed); free form.
        merged: what was merged into the offsets (adapter, factor, mode); None for a base.
        offsets_at: which weight of a group fp16 holds: "middle", the one at the middle code (more
            exact), or "minimum", the one at code 0, as llama.cpp's files do: a model that was
            trained so is exported to GGUF bit for bit. The `offsets` tensors hold these weights.

    Raises:
        ConfigError: a value is out of range, or of a format version that is newer than ours.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        desc_act: bool = False,
        offsets_dtype: str = "float16",
        modules_to_not_convert: list[str] | None = None,
        dynamic: dict[str, dict[str, int]] | None = None,
        method: str = "rtn",
        base: dict[str, Any] | None = None,
        merged: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        offsets_at: str = "middle",
        **kwargs: Any,
    ):
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ConfigError(
                f"quantization_config has unknown keys {sorted(kwargs)}; known are "
                f"{sorted(vars(QALoRAQuantConfig()))}"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.desc_act = desc_act
        self.offsets_dtype = offsets_dtype
        self.offsets_at = offsets_at
        self.modules_to_not_convert = modules_to_not_convert
        if isinstance(modules_to_not_convert, tuple):
            self.modules_to_not_convert = list(modules_to_not_convert)
        self.dynamic = dict(dynamic or {})
        self.method = method
        self.base = dict(base or {})
        self.merged = merged
        self._check()

    def _check(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ConfigError(
                f"quantization_config: format_version {self.format_version!r} is not the one that "
                f"this release reads ({FORMAT_VERSION}); update qalora-plugin"
            )
        _check_grid("quantization_config: ", self.bits, self.group_size)
        if self.offsets_dtype not in OFFSETS_DTYPES:
            raise ConfigError(
                f"quantization_config: offsets_dtype must be one of {sorted(OFFSETS_DTYPES)}, "
                f"found {self.offsets_dtype!r}"
            )
        if self.offsets_at not in OFFSETS_AT:
            raise ConfigError(
                f"quantization_config: offsets_at must be one of {OFFSETS_AT}, "
                f"found {self.offsets_at!r}"
            )
        if self.offsets_at == "minimum" and self.offsets_dtype != "float16":
            raise ConfigError(
                "quantization_config: offsets_at 'minimum' stores minima as offsets_dtype "
                f"'float16', found {self.offsets_dtype!r}; leave offsets_dtype out"
            )
        if self.method not in METHODS:
            raise ConfigError(
                f"quantization_config: method must be one of {METHODS}, found {self.method!r}"
            )
        listed = self.modules_to_not_convert
        if listed is not None and not (
            isinstance(listed, list) and all(isinstance(entry, str) for entry in listed)
        ):
            raise ConfigError(
                "quantization_config: modules_to_not_convert must be a list of names, "
                f"found {listed!r}"
            )
        for pattern, override in self.dynamic.items():
            unknown = set(override) - _LAYER_KEYS
            if unknown:
                raise ConfigError(
                    f"quantization_config: dynamic[{pattern!r}] has unknown keys "
                    f"{sorted(unknown)}; known are {sorted(_LAYER_KEYS)}"
                )
            _check_grid(
                f"quantization_config: dynamic[{pattern!r}]: ",
                override.get("bits", self.bits),
                override.get("group_size", self.group_size),
            )

    def to_dict(self) -> dict[str, Any]:
        """For config.json; what is as releases without it have it is left out."""
        written = super().to_dict()
        if self.offsets_at == "middle":
            del written["offsets_at"]
        return written

    def get(self, key: str, default: Any = None) -> Any:
        """Transformers asks the config of a loaded model as if it were a dict."""
        return getattr(self, key, default)

    @property
    def group_sizes(self) -> list[int]:
        """Every group size that this config names, those of `dynamic` included."""
        overrides = (override.get("group_size") for override in self.dynamic.values())
        return [self.group_size, *(size for size in overrides if size is not None)]

    def is_converted(self, name: str) -> bool:
        """Whether the linear module `name` is quantized, as `modules_to_not_convert` says."""
        return not is_excluded(name, self.modules_to_not_convert or ())

    def spec_for(self, name: str, in_features: int, out_features: int) -> QuantSpec:
        """The grid of the module `name`, with its override from `dynamic` if one matches."""
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
            offsets_dtype=torch.float32 if computed else OFFSETS_DTYPES[self.offsets_dtype],
            offsets_at=self.offsets_at,
        )
