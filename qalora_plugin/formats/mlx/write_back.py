"""Write a merged model back into a copy of an MLX directory: biases, and scales if they changed.

Training rounded both to the numbers that the file's dtype holds, so they are written as they are. A
group that has not changed keeps its bytes.
"""

from pathlib import Path

import torch

from qalora_kernels import round_minimum, store_offsets

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...errors import CheckpointError
from ..export import ExportResult, Progress
from ..write_back import changed_layer, check_same_model, patched_directory
from . import FORMAT

EXACTNESS = "Exact: biases (and adapted scales) are written back, all else is the source's."


def write_back(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, out: Path, progress: Progress | None
) -> ExportResult:
    """Patch biases and scales of the layers that have changed; see `formats.original`.

    Raises:
        CheckpointError: the merged model's scales or minima are of another dtype.
    """
    check_same_model(source, merged)
    for name, spec in source.layers.items():
        if merged.layers[name] != spec:
            raise CheckpointError(
                f"{merged.directory}: {name}: expected minima in {spec.stored_dtype}, found "
                f"{merged.layers[name]}. Merge into the MLX model itself, or into what `qalora "
                "import` made of it."
            )
    with patched_directory(source, out) as patch:
        for done, (name, spec) in enumerate(source.layers.items(), start=1):
            before, after = changed_layer(source, merged, name)
            scaled = before.scales != after.scales
            # folding in nothing rounds the offset as well
            same = round_minimum(
                before.offsets.double(), before.scales, spec.mid, spec.stored_dtype
            )
            moved = scaled | (same != after.offsets)
            biases = store_offsets(after.offsets, after.scales, spec)
            scales = after.scales.to(spec.scales_dtype)
            for part, changed, new in (("biases", moved, biases), ("scales", scaled, scales)):
                if changed.any():
                    old = source.reader.get(f"{name}.{part}")
                    patch.write(f"{name}.{part}", torch.where(changed.t(), new.t(), old))
            if progress is not None:
                progress(done, len(source.layers))
    return ExportResult(out, FORMAT.name, len(source.layers), EXACTNESS)
