"""Export a merged model to what other runtimes read."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.fit import check_fit
from ..checkpoint.format import Format, exports, format_named, formats
from ..checkpoint.kind import find_kind, find_model
from ..checkpoint.layout import expert_place
from ..checkpoint.source import SOURCE_KEY
from ..errors import CheckpointError, ConfigError
from ..files.atomic import AtomicDirectory
from ..files.json import read_json
from ..files.manifest import checked_beside
from ..files.names import CONFIG_FILE
from .record import write_record

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Args:
        out: the directory or file.
        format: name of the format.
        layers: number of quantized layers that were written as integers.
        exactness: how far the exported weights equal the source's, in one sentence.
        dense: layers that the format cannot hold as integers, and why, by name.
        measured: what an inexact export was measured to cost, see `formats.requantize.Loss`.
    """

    out: Path
    format: str
    layers: int
    exactness: str
    dense: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {**asdict(self), "out": str(self.out)}

    def as_text(self) -> str:
        """Return a few lines for people."""
        whys = set(self.dense.values())
        if not self.layers and len(whys) == 1:
            return (
                f"{self.out}: {len(self.dense)} layers in format {self.format}, all of them dense "
                f"({whys.pop()}). {self.exactness}"
            )
        lines = [f"{self.out}: {self.layers} layers in format {self.format}. {self.exactness}"]
        for why in sorted(whys):
            names = [name for name, reason in self.dense.items() if reason == why]
            lines.append(f"  {len(names)} layers dense, {names[0]} the first: {why}")
        engines = [f"  {engine.as_text()}" for engine in format_named(self.format).engines]
        return "\n".join([*lines, *(["What engines do with it:"] if engines else []), *engines])


def obstacles(source: QuantizedCheckpoint, format: Format) -> dict[str, str]:
    """Return the layers that a format cannot hold as integers, and why, by name.

    Raises:
        CheckpointError: it can hold none of them, so the export would be a dense model.
    """
    found = {
        name: format.grids.obstacle(spec, source.config.desc_act)
        for name, spec in source.layers.items()
    }
    reasons = {name: why for name, why in found.items() if why is not None}
    if len(reasons) == len(source.layers) and format.grids.dense_as is None:
        name, why = next(iter(reasons.items()))
        raise CheckpointError(
            f"{source.directory}: format {format.name!r} can hold none of its layers as integers "
            f"({name}: {why}). Choose another format, or quantize with other settings."
        )
    return reasons


def refuse_experts(source: QuantizedCheckpoint, format: Format) -> None:
    """Refuse a mixture that a format does not hold.

    Raises:
        CheckpointError: one of its quantized layers belongs to an expert.
    """
    expert = next((name for name in source.layers if expert_place(name)), None)
    if expert is not None and not format.holds_experts:
        held = [f.name for f in exports() if f.holds_experts and not f.of_source]
        raise CheckpointError(
            f"{source.directory}: {expert} is part of a mixture of experts, which format "
            f"{format.name!r} does not hold. Choose one of {', '.join(held)}, or run the model in "
            "our format, which transformers loads with qalora_plugin."
        )


def check_format(base: str | Path | None, format: str, adapt: str) -> None:
    """Refuse now what `export_model` would refuse of this base with an adapter of this mode.

    Args:
        base: the quantized base; None of one that is not on disk, of which less is known.
        format: name of the format.
        adapt: what the adapter changes.

    Raises:
        CheckpointError: the base is damaged, or the format cannot hold it.
        ConfigError: no such format, or its library is not installed, or it cannot hold what the
            adapter changes.
    """
    found = export_format(format)
    if (problem := found.adapt_problem(adapt)) is not None:
        raise ConfigError(problem)
    if base is None:
        return
    source = open_quantized(base)
    refuse_experts(source, found)
    found.check_libraries()
    if found.of_adapter:  # any other base's adapter is held
        return
    write = found.module("write")
    obstacles(source, found)
    if hasattr(write, "check"):
        write.check(source)
    if found.of_source:
        _check_taken_back(source, adapt)


def _check_taken_back(source: QuantizedCheckpoint, adapt: str) -> None:
    """Refuse a mode of `adapt` whose result no layer of a base's own file takes back."""
    record = source.config.base[SOURCE_KEY]
    if record["frozen"].get(adapt) != ["*"]:
        return
    own = format_named(record["format"])
    able = " or ".join(mode for mode in own.takes_back if record["frozen"].get(mode) != ["*"])
    raise ConfigError(
        f"original does not go with adapt: {adapt}: the base is in format {own.name!r}, which "
        f"cannot take that back ({own.back_note}). Set adapt: {able}, or remove original"
    )


def export_format(name: str) -> Format:
    """Return the format of this name, in which models are written.

    Raises:
        ConfigError: no such format, or one that is read only.
    """
    names = [format.name for format in exports()]
    if name in names:
        return format_named(name)
    if name in (format.name for format in formats()):
        raise ConfigError(
            f"format: {name!r} is read as a base only. Choose one of {', '.join(names)}; "
            "'original' writes a copy of the base's own file"
        )
    raise ConfigError(f"format: expected one of {', '.join(names)}, found {name!r}")


def refuse_calibration(text: Mapping[str, Any]) -> None:
    """Refuse text to calibrate on beside an export that calibrates nothing.

    Raises:
        ConfigError: `text`, of `formats.requantize.Text`, has one.
    """
    if text.get("calibration") is not None:
        raise ConfigError(
            "calibration: nothing is calibrated when integers are written as they are; "
            "leave it out, or ask for requantize (--requantize)"
        )


def export_path(merged: Path, format: str, base: str | Path | None) -> Path:
    """Return where an export goes beside the merged directory, of which `base` is the base.

    Raises:
        CheckpointError: the base cannot be found.
        ConfigError: no such format.
    """
    found = format_named(format)
    path = found.beside(merged)
    if not found.of_source or base is None:
        return path
    place = find_model(base)
    source = find_kind(place).base
    if source is None:
        quantization = read_json(place / CONFIG_FILE).get("quantization_config") or {}
        record = (quantization.get("base") or {}).get(SOURCE_KEY)
        source = None if record is None else format_named(record["format"])
    return path if source is None else path.with_name(path.name + source.suffix)


def is_file_name(path: str | Path) -> bool:
    """Say whether a name is read as that of a model in one file, such as model.gguf."""
    return Path(path).suffix in {format.suffix for format in formats() if format.suffix}


def export_model(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> ExportResult:
    """Write a quantized model for another runtime, a few layers in memory at a time.

    Args:
        source: the merged model: a directory in our format or stock GPTQ, or a Hub id. For "lora",
            the adapter.
        out: the directory to make (for "gguf", the file); it must not exist.
        format: "gptq", "compressed-tensors", "gguf", "mlx", "onnx", "torchao", "lora", or
            "original": the base's own file or directory again.
        progress: called with (tensors written, tensors in all).
        options: `base` and `convention` for "lora", as `merge_adapter` has them; `original` for
            "original" (where the base's file lies by now); `exact` for "gguf" (layers in fp32);
            `checkpoint_format` for "gptq" ("gptq", or "gptq_v2" for GPTQModel); for "gptq" and
            "compressed-tensors" `requantize`, and the settings that go with it (see
            `formats.requantize.Text`).

    Returns:
        What was written, and how exactly.

    Raises:
        OutputError: the target is not empty, or cannot be written.
        CheckpointError, AdapterError: the source is damaged, or the format cannot hold it.
        ConfigError: no such format or option, or the format's library is not installed.
    """
    found = export_format(format)
    known = sorted(option.name for option in found.options)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            f"format {format!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    options["progress"] = progress
    if found.of_adapter:
        found.check_libraries()
        return _write(found, source, out, options)
    place = find_model(source)
    with checked_beside(place):
        opened = open_quantized(place)
        refuse_experts(opened, found)
        found.check_libraries()
        check_fit(opened)
        return _write(found, source, out, options)


def _write(
    format: Format, source: str | Path, out: str | Path, options: dict[str, Any]
) -> ExportResult:
    """Write the file or directory, once the source is known to fit its config."""
    write, names_file = format.module("write").export, is_file_name(out)
    if names_file and not (format.suffix or format.of_source):
        raise ConfigError(
            f"{out}: expected the name of a directory, which format {format.name!r} is, found one "
            f"that ends in {Path(out).suffix}. Choose another name."
        )
    if names_file or format.suffix:
        # a file says itself what it is
        result: ExportResult = write(source, out, **options)
        return result
    directory = AtomicDirectory(out)
    with directory as partial:  # the record appears with what it is of
        inner = partial / directory.target.name  # `out` may be "."
        result = write(source, inner, **options)
        record = result.as_dict() | ({"written_back": True} if format.of_source else {})
        del record["out"]
        write_record(inner, record, source)
        work = inner.rename(partial / f".{secrets.token_hex(4)}")  # a file may have its name
        for path in list(work.iterdir()):
            path.rename(partial / path.name)
        work.rmdir()
    return replace(result, out=directory.target)
