"""What a GGUF file of ours says of itself: it has no record beside it."""

import json
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from . import FORMAT

SOURCE_KEY = "qalora.source"
EXACT = "Exact to the rounding of fp32, in which everything is stored."


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a file's record, see `formats.record`; None of a file that is not ours.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        reader = FORMAT.library("gguf").GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF ({error}).") from error
    if SOURCE_KEY not in reader.fields:
        return None
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    source = json.loads(reader.fields[SOURCE_KEY].contents())
    rounding = source.pop("exactness", "Integers and scales are exact, minima rounded to f16.")
    if "Q4_1" in kinds:
        exactness = f"{kinds.count('Q4_1')} matrices are Q4_1. {rounding}"
    elif "F16" in kinds:
        exactness = "Layers are F16, rounded from fp32."
    else:
        exactness = EXACT
    return {"format": FORMAT.name, "source": source, "exactness": exactness}
