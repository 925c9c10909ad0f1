"""Export a merged model to what other runtimes read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import open_quantized
from ..checkpoint.format import format_named
from ..errors import ConfigError
from .record import write_record
from .walk import ExportResult, Progress, require

FORMATS = ("gptq", "gguf", "mlx", "onnx", "torchao", "lora")
OPTIONS: dict[str, frozenset[str]] = {
    "gguf": frozenset({"exact"}),
    "gptq": frozenset(
        {"checkpoint_format", "requantize", "calibration", "samples", "seq_len", "seed"}
    ),
    "lora": frozenset({"base", "convention"}),
}

# what an adapter may change for a format; any other takes every `adapt`
ADAPTS = {"gptq": frozenset({"scales"}), "lora": frozenset({"zeros"})}
_LIBRARIES = {"gguf": ("gguf",), "onnx": ("onnx", "onnxruntime_genai", "onnx_ir")}

__all__ = ["ADAPTS", "FORMATS", "ExportResult", "check_format", "check_libraries", "export_model"]


def _module(format: str) -> str:
    return "export" if format == "gptq" else "write"


def check_libraries(format: str) -> None:
    """Refuse a format whose libraries are missing.

    Raises:
        ConfigError: names the library.
    """
    for module in _LIBRARIES.get(format, ()):
        require(module, format)


def check_format(base: str | Path, format: str) -> None:
    """Refuse now what `export_model` would refuse of any model that is this base, adapted.

    What the adapter may change is `ADAPTS`.

    Raises:
        CheckpointError: the base is damaged, or the format cannot hold it.
        ConfigError: the format's library is not installed.
    """
    check_libraries(format)
    if format != "lora":  # which holds any base's adapter
        format_named(format).module(_module(format)).check(open_quantized(base))


def export_model(
    source: str | Path,
    out: str | Path,
    format: str,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> ExportResult:
    """Write a quantized model for another runtime, one layer in memory at a time.

    Args:
        source: the merged model: a directory in our format or stock GPTQ, or a Hub id. For "lora",
            the adapter.
        out: the directory to make (for "gguf", the file); it must not exist.
        format: one of `FORMATS`.
        progress: called with (tensors written, tensors in all).
        options: `base` and `convention` for "lora", as `merge_adapter` has them;
            `exact` for "gguf" (layers in fp32); `checkpoint_format` for "gptq" ("gptq", or
            "gptq_v2" for GPTQModel), and `requantize` with its settings (see `gptq.export`).

    Returns:
        What was written, and how exactly.

    Raises:
        OutputError: the target is not empty, or cannot be written.
        CheckpointError, AdapterError: the source is damaged, or the format cannot hold it.
        ConfigError: no such format or option, or the format's library is not installed.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    known = OPTIONS.get(format, frozenset())
    unknown = set(options) - known
    if unknown:
        raise ConfigError(
            f"format {format!r} has no option {sorted(unknown)[0]!r}; it has "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    export: Callable[..., ExportResult] = format_named(format).module(_module(format)).export
    result = export(source, out, progress=progress, **options)
    if result.out.is_dir():
        write_record(result, source)
    return result
