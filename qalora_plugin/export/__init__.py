"""Export a merged model to what other runtimes read. One file a format."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .record import write_record
from .walk import ExportResult, Progress

FORMATS = ("gptq", "gguf", "mlx", "onnx", "torchao", "lora")
OPTIONS: dict[str, frozenset[str]] = {
    "gguf": frozenset({"exact"}),
    "gptq": frozenset(
        {"checkpoint_format", "requantize", "calibration", "samples", "seq_len", "seed"}
    ),
    "lora": frozenset({"base", "convention"}),
}

__all__ = ["FORMATS", "ExportResult", "export_model"]


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
    export: Callable[..., ExportResult] = importlib.import_module(f".{format}", __name__).export
    result = export(source, out, progress=progress, **options)
    if result.out.is_dir():
        write_record(result, source)
    return result
