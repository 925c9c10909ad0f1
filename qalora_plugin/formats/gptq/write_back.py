"""Write merged scales back into a copy of a stock GPTQ directory: nothing else changes."""

from pathlib import Path

import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...errors import CheckpointError
from ..export import ExportResult, Progress
from ..write_back import changed_layer, check_same_model, patched_directory
from . import FORMAT

EXACTNESS = "Exact: scales are written back, integers and zero-points are the source's."


def write_back(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, out: Path, progress: Progress | None
) -> ExportResult:
    """Patch the scales of the layers that have changed; see `formats.original`.

    Raises:
        CheckpointError: an offset is not scale * (mid - z) with the source's zero-point z.
    """
    check_same_model(source, merged)
    with patched_directory(source, out) as patch:
        for done, name in enumerate(source.layers, start=1):
            before, after = changed_layer(source, merged, name)
            zeros = before.offsets / before.scales  # mid - z: exact, they are small integers
            if not torch.equal(after.scales * zeros, after.offsets):
                raise CheckpointError(
                    f"{merged.directory}: {name}: its zero-points have changed, and stock GPTQ "
                    "stores integers. Train with adapt='scales', or export to another format."
                )
            scales = after.scales.to(source.reader.info(f"{name}.scales").dtype)
            if not torch.equal(scales.float(), after.scales):
                raise CheckpointError(
                    f"{source.where(name)}.scales: {scales.dtype} does not hold the merged scales "
                    "exactly. Export to another format."
                )
            if not torch.equal(before.scales, after.scales):
                patch.write(f"{name}.scales", scales)
            if progress is not None:
                progress(done, len(source.layers))
    return ExportResult(out, FORMAT.name, len(source.layers), EXACTNESS)
