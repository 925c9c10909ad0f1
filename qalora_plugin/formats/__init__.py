"""Foreign formats, one folder each: read as a base, written as an export, verified.

A new format is a folder with a record, `FORMAT` (see `checkpoint.format.Format`), and its name
here. Importing this package imports the records alone.
"""

import importlib

from ..checkpoint.format import Option, register_format

FOLDERS = (
    "gptq",
    "compressed_tensors",
    "awq",
    "auto_round",
    "gguf",
    "mlx",
    "onnx",
    "torchao",
    "lora",
    "original",
)

REQUANTIZE = (
    Option(
        "requantize",
        "of a model with real-valued zero-points: quantize the merged weights again, with "
        "integer ones, and print what that costs in held-out loss and KL divergence",
        bool,
    ),
    Option(
        "calibration",
        "with --requantize: text to quantize on, and other text of it to measure on, as "
        "`qalora quantize` takes it (default: functions of the Python standard library; the "
        "model's own training data is better)",
        metavar="FILE",
    ),
    Option("samples", "with --requantize: calibration windows (default: 128)", int),
    Option("seq_len", "with --requantize: tokens in a window (default: at most 512)", int),
    Option("seed", "with --requantize: of the choice of windows (default: 0)", int),
)
"""Options of the formats that store integer zero-points, see `formats.requantize`."""


def register() -> None:
    """Make the formats known to what is below them; a second call changes nothing."""
    for folder in FOLDERS:
        register_format(importlib.import_module(f".{folder}", __name__).FORMAT)
