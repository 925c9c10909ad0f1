"""Held-out loss of a causal LM on prompt-completion pairs or plain text."""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError

IGNORED = -100  # torch's cross_entropy and transformers skip this label


def encode(tokenizer: Any, row: dict[str, str], max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row; a prompt's tokens are not labels.

    Args:
        tokenizer: of transformers.
        row: {"prompt", "completion"} or {"text"}.
        max_length: longer rows are cut at the end.
    """
    prompt = (
        tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] if "prompt" in row else []
    )
    text = row.get("text") or row["prompt"] + row["completion"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return ids[:max_length], labels[:max_length]


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, str]],
    *,
    max_length: int = 512,
    batch_size: int = 8,
) -> float:
    """Mean loss in nats over all label tokens of `rows`.

    Args:
        model: causal LM; its mode (train or eval) is restored.
        tokenizer: its tokenizer.
        rows: see `encode`.
        max_length: tokens of a row that are used.
        batch_size: rows a forward pass; rows of similar length go together.

    Raises:
        ConfigError: no row has a token to predict.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    encoded = sorted((encode(tokenizer, row, max_length) for row in rows), key=lambda r: len(r[0]))
    total, count = 0.0, 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        longest = max(len(ids) for ids, _ in batch)
        pad = tokenizer.pad_token_id or 0
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
        labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten().to(device),
            ignore_index=IGNORED,
            reduction="sum",
        )
        total += loss.item()
        count += int((labels[:, 1:] != IGNORED).sum())
    model.train(was_training)
    if count == 0:
        raise ConfigError(
            f"held-out rows: expected tokens to predict among the first {max_length} of a row, "
            "found none: give shorter prompts"
        )
    return total / count
