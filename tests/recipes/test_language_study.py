"""The study of a language model: what is run next, how answers are judged, its tables."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from qalora_plugin.quickstart.embedded import base_model_path

STUDY = Path(__file__).parents[2] / "recipes" / "study"


@pytest.fixture
def report(monkeypatch):
    """Import recipes/study/language_report.py with its neighbours on the path."""
    monkeypatch.syspath_prepend(str(STUDY))
    for path in STUDY.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    import language_report

    return language_report


def _arguments(study, **changes):
    usual = {"settings": study.SETTINGS, "seeds": study.SEEDS, "middle_rate": False}
    return argparse.Namespace(**{**usual, **changes})


def test_bases_come_first_then_the_sweep_then_the_other_seeds_and_settings(report):
    study, rows = report.study, []
    arguments = _arguments(study, settings=study.SETTINGS[:2])
    order = []
    while run := study.wanted(rows, "gsm8k", ("zeros", "lora"), arguments):
        order.append((run["method"], run["bits"], run.get("seed"), run.get("lr")))
        rate = run.get("lr", 0)
        rows.append({**run, "validation_loss": abs(rate - 0.001), "test_loss": 1.0})
    assert order[:3] == [("base", 16, None, None), ("base", 2, None, None), ("base", 3, None, None)]
    swept = [("zeros", 2, 0, rate) for rate in study.RATES]
    assert order[3:6] == swept
    assert order[6] == ("zeros", 2, 1, 0.001)
    assert order[7:11] == [*(("lora", 16, 0, rate) for rate in study.RATES), ("lora", 16, 1, 0.001)]
    assert order[11:] == [("zeros", 3, 0, 0.001), ("zeros", 3, 1, 0.001)]
    assert len({len(study.rates(method)) for method in report.METHODS}) == 1


def test_the_sweep_can_wait(report):
    study, rows = report.study, []
    settings, seeds = study.SETTINGS[:1], study.SEEDS[:1]
    arguments = _arguments(study, settings=settings, seeds=seeds, middle_rate=True)
    while run := study.wanted(rows, "gsm8k", ("zeros", "both"), arguments):
        rows.append({**run, "validation_loss": 1.0})
    found = [(row["method"], row.get("lr")) for row in rows]
    assert found == [("base", None)] * 2 + [("zeros", 0.001), ("both", 0.001)]


class _Uniform(torch.nn.Module):
    """A model that finds every token equally likely, but one that it prefers."""

    def __init__(self, vocab, liked):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(vocab))
        self.logits.data[liked] = 3.0

    def model(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 1))

    def lm_head(self, hidden):
        return self.logits.expand(*hidden.shape[:-1], -1)


def test_answers_alone_are_judged(report):
    tasks = report.study.tasks
    model = _Uniform(10, 7)
    likely, other = (-torch.log_softmax(model.logits, 0)[n].item() for n in (7, 1))
    examples = [([1, 2, 3], [7, 7]), ([4], [1]), ([2, 2], [7, 1, 7])]
    batch = tasks.padded(examples)
    assert batch["labels"].tolist()[1] == [-100, 1, -100, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 5]
    found = tasks.answer_losses(model, batch).tolist()
    assert found == pytest.approx([2 * likely, other, 2 * likely + other])
    mean = (4 * likely + 2 * other) / 6
    assert tasks.loss(model, examples, 2) == pytest.approx(mean)


def test_the_likeliest_choice_a_token_counts(report):
    tasks = report.study.tasks
    rows = [
        ("a", [1], [[1], [7, 7, 1]], 1),  # by the sum the first one would win
        ("a", [1], [[1], [7]], 0),
        ("b", [1], [[7], [1], [2]], 0),
    ]
    task = tasks.LanguageTask("commonsense", [], [], [], rows, [])
    found = tasks.accuracies(_Uniform(10, 7), task, 2)
    assert (found["a"], found["b"], found["macro"]) == (0.5, 1.0, 0.75)
    assert found["macro_stderr"] == pytest.approx((0.25 / 2) ** 0.5 / 2)


def test_rows_of_both_tasks(report, tmp_path):
    tasks = report.study.tasks
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    plain = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(30)]
    plain.append({"question": "long " * 300, "answer": "never"})
    chosen = [
        {"task": f"t{n % 2}", "question": f"{n}?", "choices": ["yes", "no"], "label": n % 2}
        for n in range(20)
    ]
    for name, rows in (("gsm8k", plain), ("commonsense", chosen)):
        for split in ("train", "test"):
            text = "\n".join(map(json.dumps, rows))
            (tmp_path / f"{name}_{split}.jsonl").write_text(text)
    sizes = tasks.Sizes(batch=2, steps=4, validation=3, test=40, choices=6)
    task = tasks.load("gsm8k", tmp_path, tokenizer, sizes)
    assert (len(task.train), len(task.validation), len(task.test)) == (8, 3, 30)
    assert all(len(p) + len(a) <= tasks.LENGTH for p, a in task.test) and not task.choices
    prompt, answer = task.test[0]
    assert tokenizer.decode(prompt).startswith("Question: ")
    assert answer[-1] == tokenizer.eos_token_id
    task = tasks.load("commonsense", tmp_path, tokenizer, sizes)
    assert sorted(row[0] for row in task.choices) == ["t0"] * 6 + ["t1"] * 6


def test_the_table_takes_each_methods_best_rate(report):
    rows = [
        {"task": "gsm8k", "method": "base", "bits": 2, "group_size": 32, "test_loss": 2.0},
        *(
            {
                "task": "gsm8k",
                "method": "both",
                "bits": 2,
                "group_size": 32,
                "seed": seed,
                "lr": lr,
                "validation_loss": lr,
                "test_loss": loss,
                "parameters": 1000,
            }
            for seed, lr, loss in ((0, 0.001, 1.0), (0, 0.003, 0.5), (1, 0.001, 1.5))
        ),
    ]
    lines = report.table(rows, "gsm8k").splitlines()
    assert lines[0] == "|  | trained parameters | rate | 2 bits, g=32 |"
    assert lines[2] == "| not trained |  |  | 2.000 |"
    assert lines[3] == "| `both` | 1,000 | 0.001 | 1.250 ± 0.354 |"
    assert len(lines) == 4
