"""Held-out loss of a causal LM on prompt-completion pairs or plain text."""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError

IGNORED = -100  # torch's cross_entropy and transformers skip this label
MAX_LENGTH = 512
"""Tokens of a row that are used; longer rows are cut at the end."""


def row_text(row: dict[str, str]) -> str:
    """Return the whole text of a row, {"prompt", "completion"} or {"text"}."""
    return row["text"] if "text" in row else row["prompt"] + row["completion"]


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Return the token ids of a row and its labels, as TRL's SFTTrainer makes them.

    The tokenizer's special tokens are around a row, and its end is one; tokens of a prompt are not
    labels.
    """
    prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
    text, end = row_text(row), tokenizer.eos_token or ""
    ids = tokenizer(text if text.endswith(end) else text + end)["input_ids"]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return ids[:MAX_LENGTH], labels[:MAX_LENGTH]


def pad(rows: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """Return rows of different lengths as int64 [rows, longest], filled up at the end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, tokenizer: Any, rows: Sequence[dict[str, str]], batch_size: int = 8
) -> float:
    """Return the mean loss in nats over all label tokens of `rows`.

    Args:
        model: causal LM; its mode (train or eval) is restored.
        tokenizer: its tokenizer.
        rows: see `row_text`.
        batch_size: rows in a forward pass; rows of similar length go together.

    Raises:
        ConfigError: no row has a token to predict.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    encoded = sorted((encode(tokenizer, row) for row in rows), key=lambda row: len(row[0]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        all_ids, all_labels = zip(*encoded[start : start + batch_size], strict=True)
        ids = pad(all_ids, tokenizer.pad_token_id or 0).to(device)
        labels = pad(all_labels, IGNORED)[:, 1:].to(device)
        mask = pad([[1] * len(row) for row in all_ids], 0).to(device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += loss.item()
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    if count == 0:
        raise ConfigError(
            f"held-out rows: expected tokens to predict among the first {MAX_LENGTH} of a row, "
            "found none: give shorter prompts"
        )
    return total / count
