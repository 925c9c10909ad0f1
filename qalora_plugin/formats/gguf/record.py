"""What a GGUF file of ours says of itself: it has no record beside it."""

from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.json import parse_json
from ...files.schemas import SourceFacts, check_types
from . import FORMAT
from .file import open_gguf

SOURCE_KEY = "qalora.source"


class Facts(SourceFacts, total=False):
    """What the file says of its source: an export's facts, and how exact it is."""

    exactness: str


EXACT = "Exact to the rounding of fp32, in which everything is stored."


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a file's record, see `formats.record`; None of a file that is not ours.

    Raises:
        CheckpointError: it cannot be read.
    """
    reader = open_gguf(path)
    if SOURCE_KEY not in reader.fields:
        return None
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    try:
        source = parse_json(str(reader.fields[SOURCE_KEY].contents()))
    except ValueError as error:
        raise CheckpointError(f"{path}: {SOURCE_KEY}: not valid JSON ({error}).") from error
    check_types(source, Facts, f"{path}: {SOURCE_KEY}", CheckpointError)
    rounding = source.pop("exactness", "Integers and scales are exact, minima rounded to f16.")
    if "Q4_1" in kinds:
        exactness = f"{kinds.count('Q4_1')} matrices are Q4_1. {rounding}"
    elif "F16" in kinds:
        exactness = "Layers are F16, rounded from fp32."
    else:
        exactness = EXACT
    return {"format": FORMAT.name, "source": source, "exactness": exactness}
