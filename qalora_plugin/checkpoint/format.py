"""`Format`: the record of a foreign format, and the registry of those that are known.

The formats themselves live above, one folder each in `qalora_plugin.formats`, which registers them
here. So what is below (loading, quantizing, merging) can open a foreign base, and write a foreign
result, without importing any format.
"""

import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

from qalora_kernels import SUPPORTED_BITS, QuantSpec

from ..errors import ConfigError
from .config import QALoRAQuantConfig

ADAPT_MODES = ("zeros", "scales", "both")

_UNREAD = {
    "bitsandbytes": "no integers with a scale (NF4, FP4 or LLM.int8())",
    "bitnet": "ternary weights",
    "fp8": "8-bit floats (FP8)",
    "fbgemm_fp8": "8-bit floats (FP8)",
    "hqq": "groups that may lie along the outputs",
    "modelopt": "4- or 8-bit floats (NVFP4, FP8)",
    "mxfp4": "4-bit floats (MXFP4)",
    "nvfp4": "4-bit floats (NVFP4)",
}
"""What formats store that cannot be bases, by `quant_method`."""


@dataclass(frozen=True)
class Grids:
    """The quantized layers that a format can hold as integers.

    Args:
        bits: widths of its integers.
        blocks: numbers of neighbouring inputs that may share a scale, largest first, into which
            larger groups are cut; None if any number may.
        short_last: whether a layer's last block may be short.
        act_order: whether the inputs of a group may lie apart (g_idx).
        integer_zeros: whether zero-points are integers.
        holder, pieces: for messages: what has these limits, and into what groups are to be cut.
        dense_as: dtype of layers that do not fit, of which a whole model may consist. None: they
            are written in fp32, and a model in which no layer fits is refused.
    """

    bits: tuple[int, ...] = SUPPORTED_BITS
    blocks: tuple[int, ...] | None = None
    short_last: bool = False
    act_order: bool = False
    integer_zeros: bool = False
    holder: str = ""
    pieces: str = ""
    dense_as: str | None = None

    def block(self, spec: QuantSpec) -> int:
        """Return the largest block that a layer's groups can be cut into, 0 if there is none."""
        if self.blocks is None:
            return math.gcd(spec.group_size, spec.in_features)
        if self.short_last and spec.num_groups == 1:
            return self.blocks[0] if spec.in_features >= self.blocks[0] else self.blocks[-1]
        length = spec.group_size
        if not self.short_last:
            length = math.gcd(length, spec.in_features)
        return next((block for block in self.blocks if length % block == 0), 0)

    def obstacle(self, spec: QuantSpec, act_order: bool) -> str | None:
        """Say why a layer cannot be held as integers; None if it can."""
        why = None
        if spec.bits not in self.bits:
            why = f"{self.holder} has no type with {spec.bits} bits and an offset"
        elif act_order and not self.act_order:
            why = f"its groups follow act-order (g_idx), the blocks of {self.holder} are neighbours"
        elif not self.block(spec):
            inputs = "" if self.short_last else f" in {spec.in_features} inputs"
            why = f"groups of {spec.group_size}{inputs} cannot be cut into {self.pieces}"
        if why is None or self.dense_as is None:
            return why
        return f"{why}; written as {self.dense_as}"


@dataclass(frozen=True)
class Option:
    """A setting of an export: a keyword of `export_model`, and an option of `qalora export`.

    Args:
        name: the keyword, such as "checkpoint_format".
        help: for the command line.
        type: of its value; a bool is a flag.
        choices: the values that it may have; empty if any.
        metavar: of its value in the help.
    """

    name: str
    help: str
    type: type = str
    choices: tuple[str, ...] = ()
    metavar: str | None = None


@dataclass(frozen=True)
class Runtime:
    """The program that a format is for.

    Args:
        title: its name.
        modules: what its interpreter needs; of alternatives in one entry, one.
        install: what pip installs.
        rounds_activations: whether it rounds them; then `run` gives log-probabilities of the last
            token, and `weights.rounded(model, exported, source)` is a context in which our model
            rounds likewise.
        on: of an adapter: the format in which its base is written, whose `run` takes the adapter.
    """

    title: str
    modules: tuple[tuple[str, ...], ...]
    install: str
    rounds_activations: bool = False
    on: str | None = None


@dataclass(frozen=True)
class Engine:
    """What one engine does with an export, as a test has found.

    Args:
        name: of the engine, with the version where others may differ.
        runs: "exactly" (as our fp32 model, to the rounding of the engine's own arithmetic),
            "approximately", or "not" (it refuses).
        note: under which conditions, or why; may be empty.
        test: the file in `integration/`, and the test in it after "::".
    """

    name: str
    runs: Literal["exactly", "approximately", "not"]
    note: str
    test: str

    def as_text(self) -> str:
        """Return "name: how (note)"."""
        return f"{self.name}: {self.runs}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Format:
    """The record of one foreign format: all that is known before any of its code is imported.

    Its folder has, by convention, these modules, imported on first use:

        read      of a base: `open_checkpoint(path) -> QuantizedCheckpoint`, and where there are
                  `quant_methods` `parse_config(raw, path) -> QALoRAQuantConfig`
        write_back  of a base with `takes_back`: `write_back(source, merged, out, progress) ->
                  ExportResult` patches a copy of the source, see `formats.write_back`
        write     `export(source, out, *, progress, **options) -> ExportResult`, and where more
                  than `grids` decides `check(source)`
        weights   `Weights(exported, source)`, see `formats.weights`; of an adapter
                  `compare(exported, adapter, base, progress)`
        run       a program that runs an export in its runtime, and imports nothing of ours
        record    of a format that is one file: `read_record(path)`, see `formats.record`

    Args:
        name: as `--format` takes it.
        package: dotted name of the folder.
        grids: the layers that it holds.
        suffix: of the file that it is; empty if it is a directory.
        quant_methods: values of `quant_method` in config.json's `quantization_config`.
        marker: a file that marks a directory; beside `quant_methods` only if config.json is silent.
        config_key: a key that only its config.json has.
        unnamed_keys: keys of its `quantization_config`, which has no quant_method.
        is_base: whether models in this format are read, as bases.
        is_export: whether models are written in this format: else there is no module `write`,
            `weights` or `run`.
        owners: of a base: the modules with which transformers loads it itself; where all are
            installed it does, unless it is told to load it as a base of ours.
        reads_exports: whether our own exports in this format can be bases as well.
        takes_back: the modes of `adapt` whose merged result a base in this format takes back, so
            that a copy of it is patched (`qalora export --format original`). Single layers may
            take back less, see `QuantizedCheckpoint.takes_back`. Empty: nothing.
        keeps_within: whether an adapter on such a base is kept within that unless its config says
            `write_back=False`; else only with `write_back=True`.
        back_note: why it takes back no more, for messages: "its zero-points are integers".
        of_adapter: whether it holds an adapter instead of a merged model.
        of_source: whether it stands for the format that the model's base came in.
        adapts: what an adapter may change so that the format holds the result.
        advice: why it may not change more, and what to do.
        holds_experts: whether an export holds the experts of a mixture; else mixtures are refused.
        options: of an export.
        libraries: modules that writing needs, installed by the extra "export".
        headers: of a base: the module whose `open_checkpoint` reads no more than headers, without
            torch; layers can be read by that of `read` only.
        runs_in: the programs that load it.
        runtime: the one that verifies exports.
        engines: what engines do with an export; nothing is claimed that no test has found.
        hub_library: `library_name` of its model card.
        usage: how it is loaded, Markdown of its model card with {repo_id} and {file}.
    """

    name: str
    package: str
    grids: Grids
    runs_in: str
    runtime: Runtime
    hub_library: str
    usage: str
    engines: tuple[Engine, ...] = ()
    suffix: str = ""
    marker: str | None = None
    quant_methods: tuple[str, ...] = ()
    config_key: str | None = None
    unnamed_keys: tuple[str, ...] = ()
    is_base: bool = False
    is_export: bool = True
    owners: tuple[str, ...] = ()
    reads_exports: bool = True
    takes_back: tuple[str, ...] = ()
    keeps_within: bool = True
    back_note: str = ""
    of_adapter: bool = False
    of_source: bool = False
    adapts: tuple[str, ...] = ADAPT_MODES
    advice: str = ""
    holds_experts: bool = False
    options: tuple[Option, ...] = ()
    libraries: tuple[str, ...] = ()
    headers: str = "read"

    @property
    def can_write_back(self) -> bool:
        """Whether a base in this format takes any merged result back."""
        return bool(self.takes_back)

    def module(self, part: str) -> Any:
        """Import one module of the format's folder, such as "read" or "write"."""
        return importlib.import_module(f"{self.package}.{part}")

    def library(self, module: str) -> ModuleType:
        """Import a library that the format needs; a ConfigError says how to install it."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"format {self.name!r} needs the package {module.partition('.')[0]!r} ({error}). "
                "Install what exports need: pip install '.[export]', in a clone of qalora-plugin"
            ) from error

    def adapt_problem(self, adapt: str) -> str | None:
        """Say why the format does not hold what an adapter of this mode makes; None if it does."""
        if adapt in self.adapts:
            return None
        return f"{self.name} does not go with adapt: {adapt}: {self.advice}"

    def check_libraries(self) -> None:
        """Raise ConfigError if a library that writing needs is not installed."""
        for module in self.libraries:
            self.library(module)

    @property
    def script(self) -> Path:
        """The program `run.py` that runs an export: in the folder, or in that of `runtime.on`."""
        if self.runtime.on is not None:
            return format_named(self.runtime.on).script
        return Path(str(importlib.import_module(self.package).__file__)).with_name("run.py")

    def beside(self, path: Path) -> Path:
        """Return where an export goes beside `path`: `path.suffix` of a file, else `path-name`."""
        return path.with_name(path.name + (self.suffix or f"-{self.name}"))

    def marks(self, config: Mapping[str, Any], directory: Path | None = None) -> bool:
        """Say whether a config.json, and the files beside it, are of this format (see `kind`)."""
        quantization = config.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if self.quant_methods and quantization is not None:
            return method in self.quant_methods
        if self.config_key is not None and self.config_key in config:
            return method is None
        if self.marker is None or directory is None:
            return False
        return (directory / self.marker).exists()


_FORMATS: dict[str, Format] = {}


def register_format(format: Format) -> None:
    """Make a format known under its name; a second call with the same one changes nothing."""
    _FORMATS[format.name] = format


def formats() -> Iterator[Format]:
    """Yield every known format, in the order of registration."""
    yield from _FORMATS.values()


def exports() -> Iterator[Format]:
    """Yield every format that `export_model` writes, in the order of registration."""
    yield from (format for format in formats() if format.is_export)


def format_named(name: str) -> Format:
    """Return the format of this name.

    Raises:
        ConfigError: no format has this name.
    """
    if name not in _FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(_FORMATS)}, found {name!r}")
    return _FORMATS[name]


def owners_of(quantization_config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules with which transformers loads a directory that says this, without us."""
    config = {"quantization_config": quantization_config}
    return next((f.owners for f in formats() if f.is_base and f.marks(config)), ())


def foreign_config(quantization_config: Any, path: Path) -> QALoRAQuantConfig | None:
    """Return our config of a base in a foreign format, from its `quantization_config` alone.

    Args:
        quantization_config: of config.json.
        path: of config.json, for messages.

    Returns:
        None where no registered format reads it.

    Raises:
        CheckpointError: its format is known, but names an option that is not read.
    """
    config = {"quantization_config": quantization_config}
    keys = quantization_config if isinstance(quantization_config, dict) else {}
    for format in formats():
        unnamed = bool(format.unnamed_keys) and "quant_method" not in keys
        if not format.is_base or not (format.quant_methods or unnamed):
            continue
        if keys.keys() >= {*format.unnamed_keys} if unnamed else format.marks(config):
            read = format.module("read")
            return cast(QALoRAQuantConfig, read.parse_config(quantization_config, path))
    return None


def unread_note(method: Any) -> str:
    """Return ", which stores ..." for a `quant_method` that is known to be no base, else ""."""
    return f", which stores {_UNREAD[method]}" if method in _UNREAD else ""
