"""Foreign formats, one folder each: read as a base, written as an export, verified."""

from ..checkpoint.format import register_format
from . import gguf, gptq, lora, mlx, onnx, torchao


def register() -> None:
    """Make the formats known to what is below them; a second call changes nothing."""
    for format in (gptq, gguf, mlx, onnx, torchao, lora):
        register_format(format.FORMAT)
