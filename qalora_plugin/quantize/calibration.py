"""Text -> token windows of equal length, on which a model's activations are recorded."""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import QuantizationError

# fields that hold the parts of one example, tried in this order
_FIELDS = (
    ("text",),
    ("messages",),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
)
_PIECE = 4096  # characters of a plain text file that stay together
_WHAT_TO_GIVE = (
    "Give a .txt or .jsonl file, a datasets.Dataset, a list of strings, or token ids "
    "[samples, seq_len]; a few hundred kilobytes of the text that the model will be used on is "
    'enough. Without any data, use method "rtn"'
)

Calibration = str | Path | torch.Tensor | Iterable[Any]
"""A .txt or .jsonl file, token ids [samples, seq_len], or strings or rows (dicts)."""


def calibration_windows(
    source: Calibration | None,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int = 0,
) -> torch.Tensor:
    """Draw token windows from text.

    Examples are shuffled, joined, and cut into windows; each begins (and ends) with the special
    tokens that the tokenizer puts around a text.

    Args:
        source: see `Calibration`. Rows are dicts with the fields text, messages, prompt and
            completion, question and answer, or instruction and output (or response).
        tokenizer: of transformers; may be None for token ids.
        samples: windows wanted; fewer come back from a short text.
        seq_len: tokens in a window.
        seed: of the shuffle.

    Returns:
        int64 [samples, seq_len].

    Raises:
        QuantizationError: nothing given, nothing readable in it, several splits, or too little for
            one window.
    """
    if samples < 1 or seq_len < 2:
        raise QuantizationError(
            "calibration: expected samples of 1 or more and seq_len of 2 or more, found "
            f"{samples} and {seq_len}: leave both out for 128 windows of 512 tokens"
        )
    if source is None:
        raise QuantizationError(f"calibration: GPTQ needs text. {_WHAT_TO_GIVE}")
    if isinstance(source, torch.Tensor):
        return _checked_ids(source)[:samples]
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
    prefix, suffix = _special_tokens(tokenizer)
    body = seq_len - len(prefix) - len(suffix)
    if body < 1:
        raise QuantizationError(
            f"calibration: seq_len {seq_len} leaves no room beside the tokenizer's special tokens"
        )
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    for text in texts:
        # verbose would warn that a text is longer than the model takes
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream += separator
        if len(stream) >= samples * body:
            break
    windows = [
        prefix + stream[start : start + body] + suffix
        for start in range(0, min(samples * body, len(stream) - body + 1), body)
    ]
    if not windows:
        raise QuantizationError(
            f"calibration: {len(texts)} examples hold {len(stream)} tokens, fewer than one window "
            f"of {seq_len}. Give more text, or a smaller seq_len"
        )
    return torch.tensor(windows, dtype=torch.int64)


def _checked_ids(ids: torch.Tensor) -> torch.Tensor:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise QuantizationError(
            "calibration: expected integer token ids [samples, seq_len], found "
            f"{ids.dtype} of shape {tuple(ids.shape)}"
        )
    return ids.to(torch.int64)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _texts(source: Any, tokenizer: Any) -> list[str]:
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        where, rows = str(path), _file_rows(path)
    else:
        where = "calibration"
        rows = ((f"calibration row {number}", row) for number, row in enumerate(source))
    texts = [text for place, row in rows if (text := _text(row, place, tokenizer)).strip()]
    if not texts:
        raise QuantizationError(f"{where}: holds no text. {_WHAT_TO_GIVE}")
    return texts


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise QuantizationError(
            f"{path}: cannot be read ({error.strerror}). {_WHAT_TO_GIVE}"
        ) from error
    if path.suffix != ".jsonl":
        for start in range(0, len(content), _PIECE):
            yield f"{path}", content[start : start + _PIECE]
        return
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise QuantizationError(f"{place}: not JSON ({error}). Correct this line") from None


def _text(row: Any, place: str, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for fields in _FIELDS:
            if all(row.get(name) is not None for name in fields):
                parts = [row[name] for name in fields]
                if any(isinstance(part, list) for part in parts):
                    return _chat(parts, place, tokenizer)
                return "\n".join(str(part) for part in parts)
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    known = ", ".join("+".join(fields) for fields in _FIELDS)
    raise QuantizationError(
        f"{place}: expected a string or one of the fields {known}; found {found}. "
        "Rename the columns"
    )


def _chat(parts: Sequence[Any], place: str, tokenizer: Any) -> str:
    messages = [message for part in parts if isinstance(part, list) for message in part]
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise QuantizationError(
            f'{place}: expected messages of the form {{"role": ..., "content": "text"}}'
        )
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(messages, tokenize=False)
    return "\n".join(message["content"] for message in messages)
