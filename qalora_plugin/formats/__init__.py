"""Foreign formats, one folder each: read as a base, written as an export, verified.

A new format is a folder with a record, `FORMAT` (see `checkpoint.format.Format`), and its name
here. Importing this package imports the records alone.
"""

import importlib

from ..checkpoint.format import register_format

FOLDERS = ("gptq", "gguf", "mlx", "onnx", "torchao", "lora")


def register() -> None:
    """Make the formats known to what is below them; a second call changes nothing."""
    for folder in FOLDERS:
        register_format(importlib.import_module(f".{folder}", __name__).FORMAT)
