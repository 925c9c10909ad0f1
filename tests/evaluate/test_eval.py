"""`qalora eval` as far as it goes without lm-evaluation-harness; `integration/evaluate` runs it."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from support.architectures import save
from support.models import llama
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, quantize_model
from qalora_plugin.checkpoint.kind import find_kind
from qalora_plugin.cli import main
from qalora_plugin.evaluate.run import EvalOptions, _load, rows_of, table
from qalora_plugin.layers.linear import QuantLinear

FOUND = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.03,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        },
        "boolq": {"alias": "boolq", "acc,none": 0.75, "acc_stderr,none": 0.04},
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.01},
    },
    "n-shot": {"arc_easy": 0, "boolq": 0, "gsm8k": 5},
    "n-samples": {"arc_easy": {"original": 9, "effective": 8}, "boolq": {"effective": 4}},
}


def test_rows_and_their_mean():
    rows = rows_of(FOUND)
    assert [(r["task"], r["metric"], r["value"], r["stderr"]) for r in rows[:4]] == [
        ("arc_easy", "acc", 0.5, 0.03),
        ("arc_easy", "acc_norm", 0.25, None),
        ("boolq", "acc", 0.75, 0.04),
        ("gsm8k", "exact_match (strict-match)", 0.125, 0.01),
    ]
    average = rows[4]
    assert (average["task"], average["value"], average["rows"]) == ("average", 0.625, 12)
    assert average["stderr"] == pytest.approx(0.025)
    assert [row["fewshot"] for row in rows] == [0, 0, 0, 5, None]
    lines = table(rows).splitlines()
    assert len(lines) == 6 and lines[1].split() == ["arc_easy", "acc", "0.5000", "0.0300", "0", "8"]


def test_a_group_of_the_harness_has_its_own_mean():
    grouped = {**FOUND, "groups": {"boolq": {}}}
    assert [row["task"] for row in rows_of(grouped)].count("average") == 0


def test_what_is_refused_before_anything_is_loaded(tmp_path, capsys):
    llama_dir = save("llama", tmp_path / "llama")
    assert main(["eval", str(llama_dir), "--tasks", "x", "--base", str(llama_dir)]) == 1
    assert "is a 16-bit model: leave it out" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "nowhere"), "--tasks", "x"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["eval", str(llama_dir), "--tasks", "x", "--device", "gpu"]) == 1
    assert "device 'gpu' cannot be used" in capsys.readouterr().err
    if importlib.util.find_spec("lm_eval") is None:
        assert main(["eval", str(llama_dir), "--tasks", "x"]) == 1
        assert "pip install '.[eval]', in a clone" in capsys.readouterr().err


def test_a_foreign_base_is_loaded_as_ours(tmp_path):
    llama(intermediate_size=128).save_pretrained(tmp_path / "llama")
    stock = tmp_path / "gptq"
    quantize_model(
        tmp_path / "llama", stock, method="rtn", format="gptq", group_size=32, progress=False
    )
    model, base = _load(stock, find_kind(stock), None, EvalOptions())
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear) and base is None


def test_an_adapter_that_was_moved_with_its_base_finds_it(tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    made, here = tmp_path / "made", tmp_path / "here"
    quantize_model(tmp_path / "llama", made / "int4", method="rtn", progress=False)
    model = AutoModelForCausalLM.from_pretrained(made / "int4")
    get_peft_model(model, QALoRAConfig(r=2)).save_pretrained(made / "adapter")
    made.rename(here)
    loaded, base = _load(here / "adapter", find_kind(here / "adapter"), None, EvalOptions())
    assert base == here / "int4"
    ids = torch.arange(12).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
