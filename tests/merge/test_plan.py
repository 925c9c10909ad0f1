"""Planning: one value from an adapter and a base, neither of which it changes."""

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import llama
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig
from qalora_plugin.merge import modules_to_save, names
from qalora_plugin.merge.adapter import open_adapter, open_base
from qalora_plugin.merge.plan import make_plan


@pytest.fixture
def adapter(quantize, tmp_path):
    """An adapter that resizes the vocabulary of a tied base, and unties it."""
    base = quantize(llama(tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    config = QALoRAConfig(r=2, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trained: Any = get_peft_model(model, config)
    trained.lm_head.modules_to_save["default"].weight.data += 1
    trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    return tmp_path / "adapter"


def test_changes_nothing_that_it_is_given(adapter):
    opened = open_adapter(adapter)
    base = open_base(opened, None)

    def state():
        own = (opened.config, opened.layers, opened.saved, opened.reader.tensors)
        return copy.deepcopy((own, base.reader.config, base.plan()))

    before = state()
    plan = make_plan(opened, base, "sum")
    assert plan.config["vocab_size"] == 70 and plan.config["tie_word_embeddings"] is False
    assert before == state()
    again = make_plan(opened, base, "sum")
    assert (again.config, again.tensors, again.dense) == (plan.config, plan.tensors, plan.dense)
    assert not {*plan.dense.from_base} & {*plan.dense.from_adapter}
    assert plan.tensors["lm_head.weight"] == (torch.float32, (70, 64))


def test_builds_the_trained_model_once_and_the_result_once(adapter, monkeypatch):
    built = []
    for module in (names, modules_to_save):
        original = module.read_architecture

        def count(*args, original=original):
            built.append(args[0].get("vocab_size"))
            return original(*args)

        monkeypatch.setattr(module, "read_architecture", count)
    opened = open_adapter(adapter)
    make_plan(opened, open_base(opened, None), "sum")
    assert built == [64, 70]
