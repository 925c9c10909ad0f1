"""The task of the study: its text as tokens, one training, one held-out loss."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from qalora_plugin.quantize.calibration import calibration_windows
from qalora_plugin.quickstart.embedded import base_model_path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Task:
    """Sizes of one training and of its evaluation, in sequences of `sequence` tokens."""

    data: str = "gsm8k"
    sequence: int = 128
    batch: int = 8
    steps: int = 80
    warmup: int = 8
    calibration: int = 128
    validation: int = 64
    test: int = 160


@dataclass(frozen=True)
class Windows:
    """The tokens of each split, int64 [sequences, length]; `validation` chooses the rate."""

    train: torch.Tensor
    calibration: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def _texts(data: str, split: str) -> list[str]:
    """Return the examples of the split "train" or "test"."""
    rows = map(json.loads, (DATA / f"{data}_{split}.jsonl").read_text().splitlines())
    return [f"{row['question']}\n{row['answer']}" for row in rows]


def windows(task: Task) -> Windows:
    """Return the tokens of the task's text, the same for every method and seed.

    Raises:
        FileNotFoundError: the data folder beside the repository is not there.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    train = task.steps * task.batch

    def drawn(split: str, samples: int) -> torch.Tensor:
        texts = _texts(task.data, split)
        return calibration_windows(texts, tokenizer, samples=samples, seq_len=task.sequence)

    seen, validation = drawn("train", train + task.validation).split([train, task.validation])
    return Windows(seen, seen[: task.calibration], validation, drawn("test", task.test))


def train(
    model: nn.Module, groups: list[dict[str, Any]], ids: torch.Tensor, task: Task, seed: int
) -> float:
    """Train with AdamW in one pass over ids; linear warm-up and decay, gradients clipped at 1.

    Args:
        model: causal LM.
        groups: parameter groups, each with its peak `lr`.
        ids: int64 [steps * batch, sequence].
        task: sizes.
        seed: of the order of the sequences.

    Returns:
        The median of the seconds a step took.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / task.warmup, (task.steps - step) / task.steps),
    )
    parameters = [p for group in groups for p in group["params"]]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    seconds = []
    model.train()
    for batch in ids[order].split(task.batch):
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def loss(model: nn.Module, ids: torch.Tensor) -> float:
    """Return the mean next-token cross entropy, in nats, over int64 [sequences, length]."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in ids.split(32)]
    return sum(losses) / len(losses)
