"""Write merged scales back into a copy of a compressed-tensors directory: nothing else changes."""

from pathlib import Path

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ..export import ExportResult, Progress
from ..write_back import write_scales_back
from . import FORMAT
from .layout import SCALE


def write_back(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, out: Path, progress: Progress | None
) -> ExportResult:
    """Patch the scales, [N, G], of the layers that have changed; see `formats.original`."""
    return write_scales_back(source, merged, out, FORMAT, progress, part=SCALE, transposed=True)
