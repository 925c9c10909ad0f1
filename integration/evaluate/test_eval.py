"""`qalora eval` in an environment with lm-evaluation-harness, against the harness run by hand."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import qalora_plugin
from qalora_plugin import QALoRAConfig, merge_adapter, quantize_model
from qalora_plugin.quickstart.embedded import base_model_path

BY_HAND = Path(__file__).with_name("by_hand.py")
TASKS = ("our_choices", "our_more_choices", "our_text")

_CHOICES = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_TEXT = """task: our_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files, and rows that are made here."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"def add_{n}(x):\n    return x +",
            "choices": [f" {n}", f" {n + 3}", " import"],
            "label": n % 2,
        }
        for n in range(24)
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for name in TASKS[:2]:
        (folder / f"{name}.yaml").write_text(_CHOICES.format(name=name, file=file))
    (folder / "our_text.yaml").write_text(_TEXT.format(file=file))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base of 3 bits, an adapter of random numbers, and the two merged."""
    qalora_plugin.register()
    folder = tmp_path_factory.mktemp("models")
    base = quantize_model(base_model_path(), folder / "base", bits=3, method="rtn", progress=False)
    model = AutoModelForCausalLM.from_pretrained(base.out, dtype=torch.float32)
    model = get_peft_model(model, QALoRAConfig(r=4, adapt="both"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qalora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder / "adapter")
    merge_adapter(folder / "adapter", folder / "merged", base=base.out)
    return folder


def test_the_harness_run_by_hand_gives_the_same_numbers(
    models, folder, programs, command_line, project_path
):
    base, adapter, merged = (models / name for name in ("base", "adapter", "merged"))
    original = base_model_path()
    cases = {
        "quantized": ([merged], f"pretrained={merged}"),
        "adapter": ([adapter, "--base", base], f"pretrained={base},peft={adapter}"),
        "16-bit": ([original], f"pretrained={original}"),
    }
    names = ",".join(TASKS)
    by_hand = (BY_HAND, folder, names, *(arguments for _, arguments in cases.values()))
    printed = programs("axolotl", PYTHONPATH=str(project_path))(*by_hand)
    truths, qalora = json.loads(printed.splitlines()[-1]), command_line("axolotl")
    found = {}
    for kind, (arguments, model) in cases.items():
        options = ["--tasks", names, "--include", folder, "--batch-size", "4", "--json"]
        report, truth = json.loads(qalora("eval", *arguments, *options)), truths[model]
        assert report["kind"] == kind
        found[kind] = report["results"]
        for row in report["results"]:
            if row["task"] == "average":
                continue
            values = truth[row["task"]]
            assert row["value"] == values[f"{row['metric']},none"], (kind, row)
            stated = values.get(f"{row['metric']}_stderr,none")
            assert row["stderr"] == (stated if isinstance(stated, float) else None)
            assert row["rows"] == 24
        assert [row["task"] for row in report["results"]].count("our_text") == 2
        singles = [r["value"] for r in report["results"] if r["metric"] == "acc"][:2]
        assert report["results"][-1]["task"] == "average"
        assert report["results"][-1]["value"] == pytest.approx(sum(singles) / 2)
    # the merged model computes what base and adapter compute, and neither is the original
    assert found["quantized"] == found["adapter"] != found["16-bit"]
    table = qalora("eval", merged, "--tasks", "our_text", "--include", folder)
    assert "bits_per_byte" in table and "few-shot" in table.splitlines()[0]
