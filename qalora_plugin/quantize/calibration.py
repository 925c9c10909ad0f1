"""Text -> token windows of equal length, on which a model's activations are recorded."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, QuantizationError
from .rows import file_rows, read_row

DEFAULT_SEQ_LEN = 512
_PIECE = 4096  # characters of a plain text file that stay together

Calibration = str | Path | torch.Tensor | Iterable[Any]
"""A .txt or .jsonl file, token ids [samples, seq_len], or strings or rows (dicts)."""


def check_sizes(samples: int, seq_len: int) -> None:
    """Refuse numbers of windows, or of tokens in one, that nothing can be calibrated on.

    Raises:
        QuantizationError: names both.
    """
    if samples < 1 or seq_len < 2:
        raise QuantizationError(
            "calibration: expected samples of 1 or more and seq_len of 2 or more, found "
            f"{samples} and {seq_len}: leave both out for 128 windows of {DEFAULT_SEQ_LEN} tokens"
        )


def longest_row(model_config: Any) -> int | None:
    """Return the tokens that a model takes in a row, None where its config names no limit."""
    limit: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return limit


def fitting_length(model_config: Any, seq_len: int | None) -> int:
    """Return the tokens in a calibration window: those asked for, or a default that fits.

    Raises:
        ConfigError: more than the model takes.
    """
    limit = longest_row(model_config)
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if limit is not None and seq_len > limit:
        raise ConfigError(
            f"seq_len {seq_len} is more than the {limit} tokens that the model takes "
            "(max_position_embeddings): give a smaller one, or leave it out"
        )
    return seq_len


def check_token_ids(windows: torch.Tensor, model: Any) -> None:
    """Refuse token ids [samples, seq_len] that the model has no embedding or no position for.

    Raises:
        QuantizationError: an id is out of the vocabulary.
        ConfigError: the windows are longer than what the model takes.
    """
    known = len(model.get_input_embeddings().weight)
    least, most = (int(bound) for bound in windows.aminmax())
    if least < 0 or most >= known:
        raise QuantizationError(
            f"calibration: expected token ids from 0 to {known - 1}, as the model has embeddings, "
            f"found {least} to {most}. Use the model's own tokenizer"
        )
    fitting_length(model.config, windows.shape[1])


def calibration_windows(
    source: Calibration, tokenizer: Any, *, samples: int, seq_len: int, seed: int = 0
) -> torch.Tensor:
    """Draw token windows from text.

    Examples are shuffled, joined, and cut into windows; each begins (and ends) with the special
    tokens that the tokenizer puts around a text.

    Args:
        source: see `Calibration`; `rows.read_row` says which fields rows may have.
        tokenizer: of transformers; may be None for token ids.
        samples: windows wanted; fewer come back from a short text.
        seq_len: tokens in a window.
        seed: of the shuffle.

    Returns:
        int64 [samples, seq_len].

    Raises:
        QuantizationError: nothing readable, several splits, or too little for one window.
    """
    check_sizes(samples, seq_len)
    if isinstance(source, torch.Tensor):
        if source.dim() != 2 or source.numel() == 0 or source.is_floating_point():
            raise QuantizationError(
                "calibration: expected integer token ids [samples, seq_len], found "
                f"{source.dtype} of shape {tuple(source.shape)}"
            )
        return source[:samples].to("cpu", torch.int64)
    if isinstance(source, Mapping):  # a datasets.DatasetDict would yield the names of its splits
        splits = list(source)
        raise QuantizationError(
            f"calibration: expected one dataset, found a {type(source).__name__} with {splits}. "
            "Give one of its splits" + (f", such as dataset[{splits[0]!r}]" if splits else "")
        )
    if tokenizer is None:
        raise QuantizationError("calibration: text needs a tokenizer: pass tokenizer=")
    texts = _texts(source, tokenizer)
    random.Random(seed).shuffle(texts)
    prefix, suffix = special_tokens(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise QuantizationError(
            f"calibration: seq_len {seq_len} leaves no room beside the tokenizer's special tokens"
        )
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # verbose would warn that a text is longer than the model takes
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False) for text in texts)
    stream = join_tokens((part["input_ids"] + separator for part in encoded), samples * body)
    if len(stream) < body:
        raise QuantizationError(
            f"calibration: {len(texts)} examples hold {len(stream)} tokens, fewer than one window "
            f"of {seq_len}. Give more text, or a smaller seq_len"
        )
    return cut_windows(stream, samples, body, prefix, suffix)


def join_tokens(parts: Iterable[Sequence[int]], enough: int) -> list[int]:
    """Return the token ids of all parts one after the other, at least `enough` if they have it."""
    stream: list[int] = []
    for part in parts:
        stream += part
        if len(stream) >= enough:
            break
    return stream


def cut_windows(
    stream: list[int],
    samples: int,
    length: int,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> torch.Tensor:
    """Cut token ids into at most `samples` windows of `length` tokens.

    Returns:
        int64 [<= samples, len(prefix) + length + len(suffix)].
    """
    starts = range(0, min(samples, len(stream) // length) * length, length)
    windows = [[*prefix, *stream[start : start + length], *suffix] for start in starts]
    return torch.tensor(windows, dtype=torch.int64)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _texts(source: str | Path | Iterable[Any], tokenizer: Any) -> list[str]:
    if isinstance(source, str | Path):
        where = str(Path(source).expanduser())
        rows = file_rows(Path(where), _PIECE)
    else:
        where = "calibration"
        rows = ((f"calibration row {number}", row) for number, row in enumerate(source))
    examples = (read_row(row, place, tokenizer) for place, row in rows)
    texts = [text for example in examples if (text := "\n".join(example.values())).strip()]
    if not texts:
        raise QuantizationError(
            f"{where}: holds no text. Give a few hundred kilobytes of what the model will be used "
            "on: a .txt or .jsonl file, a datasets.Dataset, a list of strings, or token ids "
            '[samples, seq_len]. Without any data, use method "rtn"'
        )
    return texts
