"""Write merged scales back into a copy of an AutoAWQ directory: nothing else changes."""

from pathlib import Path

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ..export import ExportResult, Progress
from ..write_back import write_scales_back
from . import FORMAT


def write_back(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, out: Path, progress: Progress | None
) -> ExportResult:
    """Patch the scales of the layers that have changed; see `formats.original`."""
    return write_scales_back(source, merged, out, FORMAT, progress)
