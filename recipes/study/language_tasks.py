"""The tasks of the study of a language model: GSM8K and commonsense, as token ids.

Loss and training see answers only. A row that is longer than `LENGTH` tokens is left out. Files are
those of shared/data (a folder that is named by --data, or by QALORA_DATA).
"""

import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

LENGTH = 192
IGNORED = -100  # as in transformers
Example = tuple[list[int], list[int]]
"""Token ids of a prompt, and of its answer."""


@dataclass(frozen=True)
class Sizes:
    """Rows of one training and its evaluation; `choices` of each commonsense task."""

    batch: int = 8
    steps: int = 60
    validation: int = 64
    test: int = 192
    choices: int = 100
    calibration: int = 32
    window: int = 256


@dataclass(frozen=True)
class LanguageTask:
    """One task: what is trained on, what chooses the rate, what is reported.

    Args:
        name: "gsm8k" or "commonsense".
        train, validation, test: examples whose answers are learnt, and judged by their loss.
        choices: (task, prompt, choices, label) rows, judged by the likeliest choice.
        text: of the training rows, to calibrate and to refine on.
    """

    name: str
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    choices: list[tuple[str, list[int], list[list[int]], int]]
    text: list[str]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _question(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _draw(rows: list[dict[str, Any]], answer: Any, tokenizer: Any, count: int) -> list[Example]:
    """Return the first `count` rows that are short enough, as examples."""
    found: list[Example] = []
    for row in rows:
        prompt = tokenizer(_question(row), add_special_tokens=False)["input_ids"]
        wanted = tokenizer(" " + answer(row), add_special_tokens=False)["input_ids"]
        wanted.append(tokenizer.eos_token_id)
        if len(prompt) + len(wanted) <= LENGTH:
            found.append((prompt, wanted))
        if len(found) == count:
            break
    return found


def load(name: str, data: Path, tokenizer: Any, sizes: Sizes) -> LanguageTask:
    """Return a task, the same rows for every method and seed.

    Raises:
        FileNotFoundError: `data` does not hold the task's files.
    """
    shuffle = random.Random(0).shuffle
    train, test = (_read(data / f"{name}_{split}.jsonl") for split in ("train", "test"))
    shuffle(train)
    shuffle(test)
    seen = sizes.steps * sizes.batch

    def answer(row: dict[str, Any]) -> str:
        return row["answer"] if name == "gsm8k" else row["choices"][row["label"]]

    examples = _draw(train, answer, tokenizer, seen + sizes.validation)
    choices = []
    if name == "commonsense":
        left = dict.fromkeys((row["task"] for row in test), sizes.choices)
        for row in test:
            if left[row["task"]]:
                left[row["task"]] -= 1
                prompt = tokenizer(_question(row), add_special_tokens=False)["input_ids"]
                ends = [
                    tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
                    for choice in row["choices"]
                ]
                choices.append((row["task"], prompt[-LENGTH:], ends, row["label"]))
    return LanguageTask(
        name,
        examples[sizes.validation :],
        examples[: sizes.validation],
        _draw(test, answer, tokenizer, sizes.test),
        choices,
        [f"{_question(row)} {answer(row)}" for row in train[: 20 * seen]],
    )


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    """Return a batch: input_ids, attention_mask and labels, int64 [B, T], answers judged only."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids, labels, mask = (torch.full((len(examples), width), fill) for fill in (0, IGNORED, 0))
    for row, (prompt, answer) in enumerate(examples):
        both = torch.tensor(prompt + answer)
        ids[row, : len(both)] = both
        mask[row, : len(both)] = 1
        labels[row, len(prompt) : len(both)] = both[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answer_losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the summed cross entropy of each row's answer, fp32 [B]; no other logits are made."""
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden, labels = whole.model(**inputs).last_hidden_state[:, :-1], batch["labels"][:, 1:]
    rows, places = torch.nonzero(labels != IGNORED, as_tuple=True)
    logits = whole.lm_head(hidden[rows, places]).float()
    losses = functional.cross_entropy(logits, labels[rows, places], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, rows, losses)


def _batches(examples: list[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


@torch.no_grad()
def loss(model: nn.Module, examples: list[Example], batch: int) -> float:
    """Return the mean cross entropy of answers, in nats a token."""
    model.eval()
    total, tokens = 0.0, sum(len(answer) for _, answer in examples)
    by_length = sorted(examples, key=lambda example: len(example[0]) + len(example[1]))
    for part in _batches(by_length, batch):
        total += answer_losses(model, padded(part)).sum().item()
    return total / tokens


@torch.no_grad()
def accuracies(model: nn.Module, task: LanguageTask, batch: int) -> dict[str, float]:
    """Return {task: accuracy}, `macro` and its standard error: the likeliest choice a token."""
    model.eval()
    right: dict[str, list[float]] = {}
    flat = [(prompt, end) for _, prompt, ends, _ in task.choices for end in ends]
    order = sorted(range(len(flat)), key=lambda n: len(flat[n][0]) + len(flat[n][1]))
    scores = torch.empty(len(flat))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        losses = answer_losses(model, padded([flat[n] for n in part]))
        scores[torch.tensor(part)] = losses / torch.tensor([float(len(flat[n][1])) for n in part])
    done = 0
    for name, _, ends, label in task.choices:
        best = int(scores[done : done + len(ends)].argmin())
        right.setdefault(name, []).append(float(best == label))
        done += len(ends)
    means = {name: statistics.fmean(values) for name, values in sorted(right.items())}
    variances = [m * (1 - m) / len(right[name]) for name, m in means.items()]
    error = sum(variances) ** 0.5 / len(means)
    return means | {"macro": statistics.fmean(means.values()), "macro_stderr": error}


def train(
    model: nn.Module, groups: list[dict[str, Any]], task: LanguageTask, sizes: Sizes, seed: int
) -> list[float]:
    """Train with AdamW, linear warm-up over a tenth and decay; return the seconds of each step."""
    import time

    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, sizes.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (sizes.steps - step) / sizes.steps)
    )
    parameters = [p for group in groups for p in group["params"]]
    order = list(range(len(task.train)))
    random.Random(seed).shuffle(order)
    seconds = []
    model.train()
    for step in range(sizes.steps):
        start = time.perf_counter()
        place = step * sizes.batch
        batch = padded([task.train[n] for n in order[place : place + sizes.batch]])
        optimizer.zero_grad()
        tokens = (batch["labels"][:, 1:] != IGNORED).sum()
        (answer_losses(model, batch).sum() / tokens).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        seconds.append(time.perf_counter() - start)
    return seconds
