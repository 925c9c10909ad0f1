"""The task of the comparison: its text as tokens, one training, one held-out loss."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from qalora_plugin.quant.calibration import calibration_windows
from qalora_plugin.quickstart.data import base_model_path

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
    """int64 [sequences, length] of each split; `validation` chooses the learning rate."""

    train: torch.Tensor
    calibration: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor


def _texts(data: str) -> dict[str, list[str]]:
    """Examples of the splits "train" and "test"."""
    if data == "gsm8k":
        rows = {
            split: map(json.loads, (DATA / f"gsm8k_{split}.jsonl").read_text().splitlines())
            for split in ("train", "test")
        }
        return {s: [f"{r['question']}\n{r['answer']}" for r in rows[s]] for s in rows}
    speeches = (DATA / "tinyshakespeare.txt").read_text().split("\n\n")
    cut = len(speeches) * 9 // 10
    return {"train": speeches[:cut], "test": speeches[cut:]}


def windows(task: Task) -> Windows:
    """Tokens of the task's text, the same for every method and seed.

    Raises:
        FileNotFoundError: the data folder beside the repository is not there.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    texts = _texts(task.data)
    train = task.steps * task.batch
    drawn = {
        split: calibration_windows(texts[split], tokenizer, samples=samples, seq_len=task.sequence)
        for split, samples in (("train", train + task.validation), ("test", task.test))
    }
    seen, validation = drawn["train"].split([train, task.validation])
    return Windows(seen, seen[: task.calibration], validation, drawn["test"])


def train(
    model: nn.Module, groups: list[dict[str, Any]], ids: torch.Tensor, task: Task, seed: int
) -> float:
    """AdamW, linear warm-up and decay, gradients clipped at 1; one pass over ids.

    Args:
        model: causal LM.
        groups: parameter groups, each with its peak `lr`.
        ids: int64 [steps * batch, sequence].
        task: sizes.
        seed: of the order of the sequences.

    Returns:
        Median seconds a step.
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
    """Mean next-token cross entropy in nats over int64 [sequences, length]."""
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in ids.split(32)]
    return sum(losses) / len(losses)
