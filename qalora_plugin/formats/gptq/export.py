"""Stock GPTQ directories, for AutoGPTQ, GPTQModel and every runtime with GPTQ kernels.

The format stores integer zero-points. A model has them that was quantized with
`--zero-points integer` and adapted with adapt="scales"; any other is refused by name, unless
`requantize` asks for what is not exact.
"""

from pathlib import Path
from typing import Literal

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...errors import CheckpointError, ConfigError
from ...quantize.calibration import Calibration
from ..walk import ExportResult, Progress
from .requantize import requantize as quantize_again
from .write import check_writable, integer_zeros, write_stock_gptq

EXACTNESS = "Exact: integers, scales and zero-points as they are."


def export(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None,
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
    requantize: bool = False,
    calibration: Calibration | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
) -> ExportResult:
    """Write the directory; see `export_model` and `write_stock_gptq`.

    Args:
        requantize: quantize the merged weights again, with integer zero-points, and measure what
            that costs. The other arguments are for this.
        calibration: text to quantize and to measure on, see `calibration_windows`; by default
            functions of the Python standard library.
        samples: windows to calibrate on.
        seq_len: tokens in a window; by default 512, or the model's limit where that is less.
        seed: of the choice of windows.

    Raises:
        CheckpointError: zero-points are not integers, and `requantize` was not asked for.
        ConfigError: `requantize` of a model that needs none.
    """
    checkpoint = open_quantized(source)
    if not requantize:
        if calibration is not None:
            raise ConfigError(
                "calibration: nothing is calibrated when integers are written as they are; "
                "leave it out, or ask for requantize (--requantize)"
            )
        target = write_stock_gptq(checkpoint, out, checkpoint_format)
        if progress is not None:
            progress(1, 1)
        return ExportResult(target, "gptq", len(checkpoint.layers), EXACTNESS)
    if _has_integer_zeros(checkpoint):
        raise ConfigError(
            f"{checkpoint.directory}: its zero-points are integers, so it can be written as it is. "
            "Leave out requantize (--requantize)."
        )
    target, loss = quantize_again(
        checkpoint,
        out,
        checkpoint_format=checkpoint_format,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        progress=progress,
    )
    written = set(open_quantized(target).layers)
    reason = "it is outside the model's blocks, which alone are quantized again; written in fp32"
    dense = dict.fromkeys(sorted(set(checkpoint.layers) - written), reason)
    return ExportResult(target, "gptq", len(written), loss.as_text(), dense, loss.as_dict())


def check(source: QuantizedCheckpoint) -> None:
    """Refuse a model that cannot be written as it is; see `check_writable`."""
    check_writable(source)


def _has_integer_zeros(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether every layer's zero-points are integers that the format holds."""
    try:
        for name, spec in checkpoint.layers.items():
            integer_zeros(name, checkpoint.layer(name), spec)
    except CheckpointError:
        return False
    return True
