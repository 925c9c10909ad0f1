"""The numbers that an adapter may hold, whoever reads it."""

from ..errors import AdapterError
from ..files.reader import CheckpointReader, finite_bytes

_MATRICES = ("A.weight", "B.weight")
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_adapter_values(reader: CheckpointReader) -> None:
    """Check the dtype of every matrix, and read every tensor once to check its numbers.

    Args:
        reader: of the file of tensors.

    Raises:
        AdapterError: a matrix that is not of floats, a complex tensor, or NaN or infinity.
    """
    for key, info in reader.tensors.items():
        dtype = info.dtype_name
        if (key.endswith(_MATRICES) and dtype not in _FLOATS) or dtype.startswith("complex"):
            raise AdapterError(
                f"{info.file}: {key}: expected {', '.join(_FLOATS)}, found {dtype}. The file is "
                "damaged, or was written wrongly: save the adapter again."
            )
        if not all(finite_bytes(chunk, dtype) for chunk in reader.chunks(key)):
            raise AdapterError(
                f"{info.file}: {key} holds NaN or infinity: training diverged. Use an earlier "
                "checkpoint, or a lower learning rate."
            )
