"""Give a merged model integer zero-points: quantize its weights again, and measure what that costs.

The merged weights, in fp32, are quantized like a 16-bit model: GPTQ block by block on calibration
text, at the same bits and group sizes, with integer zero-points. This is not exact, so both models
then run on text that was not calibrated on.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div

from ..architecture.model import read_hf_config
from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.format import Format
from ..checkpoint.side_files import load_tokenizer
from ..errors import ConfigError, QuantizationError
from ..files.atomic import AtomicDirectory
from ..hf.load import load_model
from ..quantize.calibration import Calibration, calibration_windows, fitting_length
from ..quantize.pipeline import quantize_model
from ..quantize.stdlib_text import calibration_texts
from .directory import DenseLayers, dense_config, write_directory
from .export import ExportResult, Progress
from .zero_points import has_integer_zeros

HELD_OUT = 16  # windows, or an eighth of a shorter text


@dataclass(frozen=True)
class Text:
    """The text to calibrate and to measure on; the fields are options of `calibration_windows`.

    By default it is functions of the Python standard library.
    """

    calibration: Calibration | None = None
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of the text in results and errors."""
        if self.calibration is None:
            return "functions of the Python standard library"
        is_file = isinstance(self.calibration, str | Path)
        return str(self.calibration) if is_file else "the calibration text"

    def windows(self, model: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids int64 [samples, seq_len] to calibrate on, and others to measure on.

        Raises:
            QuantizationError: too little text.
        """
        length = fitting_length(read_hf_config(model), self.seq_len)
        is_text = not isinstance(self.calibration, torch.Tensor)
        windows = calibration_windows(
            calibration_texts() if self.calibration is None else self.calibration,
            load_tokenizer(model) if is_text else None,
            samples=self.samples + HELD_OUT,
            seq_len=length,
            seed=self.seed,
        )
        if len(windows) < 2:
            raise QuantizationError(
                f"{self.name}: holds one window of {length} tokens; one is needed to calibrate on "
                "and another to measure on. Give more text, or a smaller seq_len."
            )
        count = min(HELD_OUT, max(1, len(windows) // 8))
        return windows[:-count][: self.samples], windows[-count:]


@dataclass(frozen=True)
class Loss:
    """The cost of quantizing again, measured on held-out tokens.

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

    def as_text(self) -> str:
        """Return one sentence for people."""
        return (
            f"Quantized again, not exact: held-out loss {self.exact:.4f} -> "
            f"{self.requantized:.4f} ({self.requantized - self.exact:+.4f}), KL divergence "
            f"{self.divergence:.2e} nats a token, on {self.tokens} tokens of {self.text} that were "
            "not calibrated on."
        )


def export_requantized(
    source: QuantizedCheckpoint,
    out: str | Path,
    format: Format,
    write: Callable[[Path, Path], object],
    text: Text,
    progress: Progress | None,
) -> ExportResult:
    """Write a model with integer zero-points, its weights quantized again; measure what it costs.

    `progress` is called while the merged weights are written; then bars go to stderr.

    Args:
        source: the merged model.
        out: the directory to make.
        format: what to write.
        write: writes the second path from the first one, a model with integer zero-points.
        text: to calibrate and measure on.
        progress: called with (tensors written, tensors in all).

    Raises:
        OutputError: the target is not empty, or cannot be written.
        QuantizationError: too little text.
        ConfigError: the model needs it not, or the format does not hold its layers.
        CheckpointError: the format does not hold the model's layers.
    """
    directory, config = AtomicDirectory(out), source.config
    if has_integer_zeros(source, format):
        raise ConfigError(
            f"{source.directory}: its zero-points are integers, so it can be written as it is. "
            "Leave out requantize (--requantize)."
        )
    windows, held_out = text.windows(source.directory)
    reader = source.reader
    kept = [name for name in source.dense_names if len(reader.info(name).shape) == 2]
    with directory as partial:
        dense, integer, new = (partial / name for name in ("dense", "integer", "new"))
        write_directory(source, dense, DenseLayers(), dense_config(source), {}, progress=progress)
        quantize_model(
            dense,
            integer,
            bits=config.bits,
            group_size=config.group_size,
            calibration=windows,
            samples=len(windows),
            seq_len=windows.shape[1],
            seed=text.seed,
            zero_points="integer",
            desc_act=config.desc_act,
            dynamic=config.dynamic,
            modules_to_not_convert=[name.removesuffix(".weight") for name in kept],
            progress=progress is not None,
        )
        shutil.rmtree(dense)
        loss = compare(source, integer, held_out, text.name)
        written = set(open_quantized(integer).layers)
        write(integer, new)
        shutil.rmtree(integer)
        for path in new.iterdir():
            path.rename(partial / path.name)
        new.rmdir()
    reason = "it is outside the model's blocks, which alone are quantized again; written in fp32"
    lost = dict.fromkeys(sorted(set(source.layers) - written), reason)
    exactness = loss.as_text()
    return ExportResult(directory.target, format.name, len(written), exactness, lost, asdict(loss))


@torch.no_grad()
def compare(source: QuantizedCheckpoint, directory: Path, ids: torch.Tensor, text: str) -> Loss:
    """Run the merged model and the one made of it in `directory` on `ids`, int64 [rows, tokens]."""
    exact, other = load_model(source), load_model(open_quantized(directory))
    sums = torch.zeros(3, dtype=torch.float64)
    for window in ids:
        labels = window[1:]
        p, q = (m(window[None]).logits[0, :-1].float().log_softmax(-1) for m in (exact, other))
        losses = [cross_entropy(x, labels, reduction="sum") for x in (p, q)]
        sums += torch.stack([*losses, kl_div(q, p, log_target=True, reduction="sum")]).double()
    tokens = ids[:, 1:].numel()
    exact_loss, loss, divergence = (sums / tokens).tolist()
    return Loss(exact_loss, loss, divergence, tokens, text)
