"""Stock GPTQ directories, for AutoGPTQ, GPTQModel and every runtime with GPTQ kernels.

The format stores integer zero-points. A model has them that was quantized with
`--zero-points integer` and adapted with adapt="scales"; any other is refused by name.
"""

from pathlib import Path

from ..checkpoint.base import open_quantized
from ..checkpoint.stock_writer import write_stock_gptq
from .walk import ExportResult, Progress


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    checkpoint_format: str = "gptq",
) -> ExportResult:
    """Write the directory; see `export_model` and `write_stock_gptq`."""
    checkpoint = open_quantized(source)
    target = write_stock_gptq(checkpoint, out, checkpoint_format)
    if progress is not None:
        progress(1, 1)
    return ExportResult(
        target,
        "gptq",
        len(checkpoint.layers),
        "Exact: integers, scales and zero-points as they are.",
    )
