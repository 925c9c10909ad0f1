"""`QALoRAQuantConfig`: how a base is quantized, as config.json's `quantization_config` says it.

Files are read with this class, which needs neither torch nor transformers; `hf.config` has the one
that transformers takes.
"""

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from qalora_kernels import OFFSETS_AT, SUPPORTED_BITS
from qalora_kernels.stored import OFFSETS_DTYPES, QUANT_METHOD, SCALES_DTYPES, StoredConfig

from ..errors import ConfigError

METHODS = ("rtn", "gptq", "other")
_LAYER_KEYS = {"bits", "group_size"}


def _require(valid: bool, name: str, expected: str, found: Any) -> None:
    if not valid:
        raise ConfigError(f"quantization_config: {name} must be {expected}, found {found!r}")


def _check_grid(where: str, bits: Any, group_size: Any) -> None:
    known = type(bits) is int and bits in SUPPORTED_BITS
    _require(known, f"{where}bits", f"one of {SUPPORTED_BITS}", bits)
    valid = type(group_size) is int and (group_size == -1 or 1 <= group_size < 1 << 31)
    expected = "a positive integer, or -1 for one group per output"
    _require(valid, f"{where}group_size", expected, group_size)


def _refuse_unknown_keys(cls: type) -> type:
    """Let the constructor take a config.json's entry, and name what it does not know."""
    generated = cls.__init__  # type: ignore[misc]
    known = {item.name for item in dataclasses.fields(cls)}

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        if not kwargs.keys() <= known:
            raise ConfigError(
                f"quantization_config has unknown keys {sorted(kwargs.keys() - known)}; known are "
                f"{sorted(known)}"
            )
        generated(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_refuse_unknown_keys
@dataclass(repr=False)
class QALoRAQuantConfig(StoredConfig):
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
            other heads always do, and so do the vision and audio towers of a model that reads
            text, unless `dynamic` names them.
        dynamic: other `bits` and `group_size` for some modules: {name, its last parts, or pattern:
            {...}}; the last one that matches counts, in the order of the alphabet, as config.json
            has them (quantizing refuses another order where it counts). A tower that is named
            ("vision_model") is quantized while it loads.
        method: how the integers were found: "rtn", "gptq", or "other" of a base from elsewhere;
            while loading, "rtn" only.
        base: where the integers came from (name, revision, calibration, seed); free form.
        merged: what was merged into the offsets (adapter, factor, mode); None for a base.
        offsets_at: which weight of a group fp16 holds: "middle", the one at the middle code (more
            exact), or "minimum", the one at code 0, as llama.cpp's files do: a model that was
            trained so is exported to GGUF bit for bit. The `offsets` tensors hold these weights.
        scales_dtype: of the `scales` tensors, and of minima: "float16", or "bfloat16" or "float32"
            of a base from elsewhere.

    Raises:
        ConfigError: a value is out of range, or of a format version that is newer than ours.
    """

    def __post_init__(self) -> None:
        self.quant_method = QUANT_METHOD  # transformers writes an object's own attributes
        self.dynamic = dict(self.dynamic or {})
        self.base = dict(self.base or {})
        if isinstance(self.modules_to_not_convert, tuple):
            self.modules_to_not_convert = list(self.modules_to_not_convert)
        if (problem := self.version_problem()) is not None:
            raise ConfigError(problem)
        self._check_choices()
        self._check_layers()

    def _check_choices(self) -> None:
        for name, choices in (
            ("offsets_dtype", OFFSETS_DTYPES),
            ("scales_dtype", SCALES_DTYPES),
            ("offsets_at", OFFSETS_AT),
            ("method", METHODS),
        ):
            value = getattr(self, name)
            _require(value in choices, name, f"one of {choices}", value)
        if self.offsets_at == "minimum" and self.offsets_dtype != "float16":
            raise ConfigError(
                "quantization_config: offsets_at 'minimum' stores minima as offsets_dtype "
                f"'float16', found {self.offsets_dtype!r}; leave offsets_dtype out"
            )

    def _check_layers(self) -> None:
        _check_grid("", self.bits, self.group_size)
        names = self.modules_to_not_convert
        valid = names is None or (
            isinstance(names, list) and all(isinstance(name, str) for name in names)
        )
        _require(valid, "modules_to_not_convert", "a list of names", names)
        for pattern, override in self.dynamic.items():
            where = f"dynamic[{pattern!r}]"
            _require(isinstance(override, dict), where, "an object", override)
            if not override.keys() <= _LAYER_KEYS:
                raise ConfigError(
                    f"quantization_config: {where} has unknown keys "
                    f"{sorted(override.keys() - _LAYER_KEYS)}; known are {sorted(_LAYER_KEYS)}"
                )
            grid = {"bits": self.bits, "group_size": self.group_size} | override
            _check_grid(f"{where}: ", **grid)

    def __repr__(self) -> str:
        """Tell bits and group size, and what is not the default."""
        shown = {"bits": self.bits, "group_size": self.group_size}
        for item in dataclasses.fields(self):
            value, factory = getattr(self, item.name), item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            if value != default:
                shown[item.name] = value
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds, without newer keys where older releases read it all."""
        written = copy.deepcopy(self.__dict__)
        for key, usual in (("offsets_at", "middle"), ("scales_dtype", "float16")):
            if written[key] == usual:
                del written[key]
        return written

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value by name: transformers asks a loaded model's config as it does a dict."""
        return getattr(self, key, default)

    @property
    def group_sizes(self) -> list[int]:
        """The group sizes that this config names, those of `dynamic` included."""
        overrides = (override.get("group_size") for override in self.dynamic.values())
        return [self.group_size, *(size for size in overrides if size is not None)]
