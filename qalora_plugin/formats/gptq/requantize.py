"""Give a merged model integer zero-points: quantize its weights again, and measure what that costs.

The merged weights, in fp32, are quantized like a 16-bit model: GPTQ block by block on calibration
text, at the same bits and group sizes, with integer zero-points. This is not exact, so both models
then run on text that was not calibrated on.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoTokenizer

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import QuantizationError
from ...files.atomic import AtomicDirectory
from ...hf.load import load_model
from ...quantize.calibration import Calibration, calibration_windows, fitting_length
from ...quantize.pipeline import quantize_model
from ...quantize.stdlib_text import calibration_texts
from ..torchao.write import TorchAO
from ..walk import Progress, dense_config, write_directory
from .write import check_specs

HELD_OUT = 16  # windows, or an eighth of a shorter text
DEFAULT_TEXT = "functions of the Python standard library"


@dataclass(frozen=True)
class Loss:
    """What quantizing again costs, on held-out tokens.

    Args:
        exact: mean cross entropy of the merged model, nats a token.
        requantized: that of the model with integer zero-points.
        divergence: mean KL(exact || requantized), nats a token.
        tokens: that were predicted.
        text: where they came from.
    """

    exact: float
    requantized: float
    divergence: float
    tokens: int
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        return (
            f"Quantized again, not exact: held-out loss {self.exact:.4f} -> "
            f"{self.requantized:.4f} ({self.requantized - self.exact:+.4f}), KL divergence "
            f"{self.divergence:.2e} nats a token, on {self.tokens} tokens of {self.text} that were "
            "not calibrated on."
        )


def requantize(
    source: QuantizedCheckpoint,
    out: str | Path,
    *,
    checkpoint_format: Literal["gptq", "gptq_v2"],
    calibration: Calibration | None,
    samples: int,
    seq_len: int | None,
    seed: int,
    progress: Progress | None,
) -> tuple[Path, Loss]:
    """Write a stock GPTQ directory of a model whose zero-points are not integers.

    Arguments as `gptq.export` has them. Needs disk for the weights in fp32 beside the output, and
    memory for both models.

    Raises:
        QuantizationError: too little text.
        ConfigError, CheckpointError: the stock format does not hold the model's layers.
    """
    directory, config = AtomicDirectory(out), source.config
    check_specs(source.layers, checkpoint_format, config)
    windows, held_out = _windows(source, calibration, samples, seq_len, seed)
    reader = source.reader
    kept = [name for name in source.dense_names if len(reader.info(name).shape) == 2]
    with directory as partial:
        # every layer is among the reasons, so none is converted
        everything = dict.fromkeys(source.layers, "to be quantized")
        dense, new = partial / "dense", partial / "new"
        metadata = {"format": "pt"}
        write_directory(
            source, dense, TorchAO(), dense_config(source), everything, metadata, progress
        )
        quantize_model(
            dense,
            new,
            bits=config.bits,
            group_size=config.group_size,
            calibration=windows,
            samples=len(windows),
            seq_len=windows.shape[1],
            seed=seed,
            format=checkpoint_format,
            desc_act=config.desc_act,
            dynamic=config.dynamic,
            modules_to_not_convert=[name.removesuffix(".weight") for name in kept],
            progress=progress is not None,
        )
        shutil.rmtree(dense)
        loss = compare(source, new, held_out, _name(calibration))
        for path in new.iterdir():
            path.rename(partial / path.name)
        new.rmdir()
    return directory.target, loss


def _windows(
    source: QuantizedCheckpoint,
    calibration: Calibration | None,
    samples: int,
    seq_len: int | None,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids int64 [samples, seq_len] to calibrate on, and others to measure on."""
    length = fitting_length(AutoConfig.from_pretrained(source.directory), seq_len)
    is_text = not isinstance(calibration, torch.Tensor)
    windows = calibration_windows(
        calibration_texts() if calibration is None else calibration,
        AutoTokenizer.from_pretrained(source.directory) if is_text else None,
        samples=samples + HELD_OUT,
        seq_len=length,
        seed=seed,
    )
    if len(windows) < 2:
        raise QuantizationError(
            f"{_name(calibration)}: holds one window of {length} tokens; one is needed to "
            "calibrate on and another to measure on. Give more text, or a smaller seq_len."
        )
    count = min(HELD_OUT, max(1, len(windows) // 8))
    return windows[:-count][:samples], windows[-count:]


def _name(calibration: Calibration | None) -> str:
    """What the text is called in results and errors."""
    if calibration is None:
        return DEFAULT_TEXT
    return str(calibration) if isinstance(calibration, str | Path) else "the calibration text"


@torch.no_grad()
def compare(source: QuantizedCheckpoint, directory: Path, ids: torch.Tensor, text: str) -> Loss:
    """Run the merged model and the stock GPTQ one made of it, both read by us, in fp32.

    Args:
        source: the merged model.
        directory: the stock GPTQ one.
        ids: int64 [samples, seq_len].
        text: where they came from.
    """
    own = QALoRAQuantConfig(source.config.bits, source.config.group_size)
    exact, other = load_model(source.directory), load_model(directory, quantization_config=own)
    sums = torch.zeros(3, dtype=torch.float64)
    for window in ids:
        labels = window[1:]
        p, q = (m(window[None]).logits[0, :-1].float().log_softmax(-1) for m in (exact, other))
        losses = [cross_entropy(x, labels, reduction="sum") for x in (p, q)]
        sums += torch.stack([*losses, kl_div(q, p, log_target=True, reduction="sum")]).double()
    tokens = ids[:, 1:].numel()
    exact_loss, loss, divergence = (sums / tokens).tolist()
    return Loss(exact_loss, loss, divergence, tokens, text)
