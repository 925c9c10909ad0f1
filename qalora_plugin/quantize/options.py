"""`QuantizeOptions`: every option of quantizing, with all checks that need no model.

`quantize_model`, the command line and Axolotl's `qalora:` block share these checks; each spells the
options in an `OptionError` in its own way, such as `--offsets-at minimum`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from ..checkpoint.config import QALoRAQuantConfig
from ..errors import ConfigError
from .calibration import DEFAULT_SEQ_LEN, Calibration, check_sizes
from .gptq import GPTQSettings
from .grid import ZeroPoints
from .refine import RefineSettings

_CHOICES = {
    "zero_points": (None, *get_args(ZeroPoints)),
    "format": ("qalora", "gptq", "gptq_v2"),
    "ordering": (None, "groups", "none"),
    "dtype": (None, torch.float32, torch.bfloat16, torch.float16),
}


class OptionError(ConfigError):
    """An option is out of range, or contradicts another.

    Args:
        text: the message, in which {name} and {name=value} stand for options.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(self.spelled(lambda name, value: f"{name} {value!r}" if value else name))

    def spelled(self, spell: Callable[[str, str | None], str]) -> str:
        """Return the message; `spell` writes ("method", "rtn") or ("mse", None) in its own way."""
        return re.sub(r"{([a-z_]+)(?:=(\w+))?}", lambda found: spell(*found.groups()), self._text)


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizeOptions:
    """The options of quantizing a model.

    Args:
        bits: 2, 3, 4 or 8, or "auto": those of each layer chosen by measured sensitivity.
        target_bits: with "auto", how large the model may be: as one with so many bits everywhere,
            from 2 to 8, such as 2.5 or 3.0; scales and offsets are counted.
        group_size: inputs that share a scale and an offset: any positive number up to the widest
            layer's inputs (the last group of a layer may be short), or -1 for one group.
        method: "gptq" with calibration text, or "rtn" without.
        calibration: text for GPTQ, see `calibration.calibration_windows`.
        tokenizer: for that text; by default the model's own, which a model in memory does not have.
        samples: calibration windows.
        seq_len: tokens in a window; by default 512, or the model's limit where that is less.
        seed: of the choice of windows.
        zero_points: "real" offsets; "integer" zero-points, which stock formats need; or "none":
            the middle code is the weight 0 (symmetric, `sym`), as some engines' kernels need. By
            default what `format` holds.
        offsets_at: which weight of a group fp16 holds: "middle", the one at the middle code, or
            "minimum", the one at code 0: for models that will be run by llama.cpp, whose Q4_1
            then holds what was trained bit for bit. In memory offsets take 4 bytes, not 2.
        format: "qalora", or "gptq" (v1) or "gptq_v2" for a stock checkpoint that other runtimes
            load.
        desc_act: act-order: round inputs by size, groups scattered and listed in g_idx.
        ordering: without desc_act, "groups" (larger groups first, groups contiguous; the default)
            or "none".
        mse: search clipped ranges for each group.
        damp: added to the diagonal of the second moment, as a fraction of its mean.
        dynamic: other `bits` and `group_size` for some modules, {name or pattern: {...}}; see
            `QALoRAQuantConfig`.
        modules_to_not_convert: modules in the blocks that stay in 16 bits; see there too.
        refine: train all scales and offsets against the 16-bit model afterwards, on the calibration
            text; both models are in memory (see `refine.Refiner`).
        refine_steps: optimizer steps of that.
        refine_rate: its peak learning rate, in quantization steps.
        refine_batch: windows in one step.
        refine_norms: train the weights of normalization layers too.
        dtype: of the activations; by default the model's.
        device: where blocks are run and solved.
        revision: of a Hub repository.
        trust_remote_code: run the model's own Python code.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: an option is out of range, or contradicts another.
        QuantizationError: `samples` or `seq_len` is out of range.
    """

    bits: int | Literal["auto"] = 4
    target_bits: float | None = None
    group_size: int = 32
    method: Literal["gptq", "rtn"] = "gptq"
    calibration: Calibration | None = None
    tokenizer: Any = None
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    zero_points: ZeroPoints | None = None
    offsets_at: Literal["middle", "minimum"] = "middle"
    format: Literal["qalora", "gptq", "gptq_v2"] = "qalora"
    desc_act: bool = False
    ordering: Literal["groups", "none"] | None = None
    mse: bool = True
    damp: float = 0.01
    dynamic: dict[str, dict[str, int]] | None = None
    modules_to_not_convert: list[str] | None = None
    refine: bool = False
    refine_steps: int = RefineSettings.steps
    refine_rate: float = RefineSettings.rate
    refine_batch: int = RefineSettings.batch
    refine_norms: bool = RefineSettings.norms
    dtype: torch.dtype | None = None
    device: str | torch.device = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for text in self._contradictions():
            raise OptionError(text)
        try:
            self.config()
        except ConfigError as error:
            raise OptionError(str(error).removeprefix("quantization_config: ")) from None
        _ = self.solver, self.refining  # have checks of their own
        check_sizes(self.samples, DEFAULT_SEQ_LEN if self.seq_len is None else self.seq_len)

    def _contradictions(self) -> Iterator[str]:
        """Yield what is wrong, as texts of `OptionError`."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                yield f"{{{name}}} must be one of {allowed}, found {getattr(self, name)!r}"
        if self.format != "qalora" and self.zero_points == "real":
            yield (
                f"{{format={self.format}}} holds integer zero-points only: use "
                "{zero_points=integer}, or {format=qalora}"
            )
        if self.zeros != "real" and self.offsets_at == "minimum":
            cause = f"zero_points={self.zeros}" if self.zero_points else f"format={self.format}"
            yield (
                f"{{offsets_at=minimum}} needs real-valued offsets: with {{{cause}}} the minimum "
                "is a multiple of the scale, in general no fp16 number. Leave out one of the two"
            )
        for name in ("calibration", "desc_act", "ordering", "refine"):
            given = getattr(self, name)  # maybe a tensor, which has no truth value
            if self.method == "rtn" and given is not None and given is not False:
                yield (
                    f"{{{name}}} does not go with {{method=rtn}}, which uses no calibration data: "
                    "leave it out, or use {method=gptq}"
                )
        usual = {field.name: field.default for field in fields(self)}
        for name in ("samples", "seq_len", "damp", "mse", "dtype"):
            if self.method == "rtn" and getattr(self, name) != usual[name]:
                yield (
                    f"{{{name}}} is a setting of GPTQ and does not go with {{method=rtn}}: leave "
                    "it out, or use {method=gptq}"
                )
        if self.method == "gptq" and self.calibration is None:
            yield (
                "GPTQ needs text: give {calibration} a .txt or .jsonl file (in Python also a "
                "datasets.Dataset, a list of strings, or token ids [samples, seq_len]), best the "
                "training set; a few hundred kilobytes are enough. Or use {method=rtn}, which is "
                "less exact"
            )
        ids = self.calibration if isinstance(self.calibration, torch.Tensor) else None
        if ids is not None and self.seq_len not in (None, *ids.shape[1:]):
            yield (
                f"{{seq_len}} is {self.seq_len}, and {{calibration}} holds token ids of shape "
                f"{tuple(ids.shape)}, which are taken as they are: leave {{seq_len}} out"
            )
        yield from self._refine_contradictions()
        yield from self._bits_contradictions()
        if self.desc_act and self.ordering:
            yield (
                "{desc_act} has an order of its own, by size of input: leave out one of it and "
                "{ordering}"
            )

    def _refine_contradictions(self) -> Iterator[str]:
        for field in fields(RefineSettings):
            name = f"refine_{field.name}"
            if not self.refine and getattr(self, name) != field.default:
                yield f"{{{name}}} is a setting of {{refine}}: give both, or leave it out"

    def _bits_contradictions(self) -> Iterator[str]:
        if (self.bits == "auto") != (self.target_bits is not None):
            yield (
                "{bits=auto} and {target_bits} go together: give both, such as a target of 3.0, or "
                "neither"
            )
        if self.bits != "auto":
            return
        if self.target_bits is not None and not 2 <= self.target_bits <= 8:
            yield f"{{target_bits}} must lie between 2 and 8, found {self.target_bits}"
        if self.method == "rtn":
            yield "{bits=auto} needs calibration data to measure layers on: use {method=gptq}"
        if self.format != "qalora":
            yield f"{{format={self.format}}} has one grid for all layers: {{bits=auto}} has several"

    @property
    def zeros(self) -> ZeroPoints:
        """What zero-points may be: `zero_points`, or what follows from the format."""
        return self.zero_points or ("real" if self.format == "qalora" else "integer")

    @property
    def solver(self) -> GPTQSettings:
        """The settings with which one layer is solved."""
        ordering = "act" if self.desc_act else self.ordering or "groups"
        return GPTQSettings(ordering=ordering, damp=self.damp, mse=self.mse)

    @property
    def refining(self) -> RefineSettings:
        """The settings with which the quantized model is refined, where it is."""
        names = [field.name for field in fields(RefineSettings)]
        return RefineSettings(**{name: getattr(self, f"refine_{name}") for name in names})

    @property
    def windows(self) -> int:
        """The windows to draw: GPTQ takes `samples`, refining more, and some are held out."""
        return self.refining.windows(self.samples) if self.refine else self.samples

    def config(self) -> QALoRAQuantConfig:
        """Return the checkpoint's `quantization_config`, as far as no model is needed for it.

        With bits "auto" its bits are not chosen yet.
        """
        return QALoRAQuantConfig(
            bits=4 if self.bits == "auto" else self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
            offsets_dtype="float32" if self.zeros == "integer" else "float16",
            offsets_at=self.offsets_at,
            modules_to_not_convert=self.modules_to_not_convert,
            dynamic=self.dynamic or {},
            method=self.method,
        )


def read_options(options: QuantizeOptions | None, settings: dict[str, Any]) -> QuantizeOptions:
    """Return the options with some fields replaced by keywords of `quantize_model`.

    Raises:
        ConfigError: a keyword is no option, or a value is out of range or contradicts another.
    """
    known = [field.name for field in fields(QuantizeOptions)]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigError(
            f"quantize_model: no option is called {', '.join(unknown)}; the options are "
            f"{', '.join(known)}"
        )
    return QuantizeOptions(**settings) if options is None else replace(options, **settings)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device, once a number has gone there and back.

    Raises:
        ConfigError: torch does not know it, was built without it, or sees none.
    """
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} sees {gpus or 'no'} "
            f"GPU here. Use 'cpu'{' or ' + repr('cuda') if gpus else ''}"
        ) from error
    return found
