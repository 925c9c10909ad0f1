"""How far the offsets have moved, in what a Trainer logs."""

import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.training.figures import FiguresCallback, layer_changes


class Report(TensorBoardCallback):
    """A reporter like wandb's, that keeps what it is sent."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []

    def on_train_begin(self, *args, **kwargs):
        pass

    on_train_end = on_train_begin

    def on_log(self, *args, **kwargs):
        self.rows.append(dict(kwargs["logs"]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def adapted(base, **settings):
    quantization = QALoRAQuantConfig(bits=4, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
    return get_peft_model(model, QALoRAConfig(r=4, task_type="CAUSAL_LM", **settings))


def test_the_change_is_in_steps_of_the_grid(base):
    model = adapted(base, target_modules=["q_proj"], lora_alpha=8)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer_changes(model) == {"offset_change": {"layers.0.self_attn.q_proj": 0.0}}
    with torch.no_grad():
        layer.qalora_A["default"].weight.fill_(0.5)
        layer.qalora_B["default"].weight.fill_(0.25)
    # lora_alpha / r = 2, times a sum over r = 4 of 0.125
    expected = (1.0 / layer.base_layer.scales.float()).square().mean().sqrt().item()
    found = layer_changes(model)["offset_change"]["layers.0.self_attn.q_proj"]
    assert found == pytest.approx(expected, rel=1e-4)
    layer.base_layer.scales[0] = 0  # those have no step
    assert math.isfinite(layer_changes(model)["offset_change"]["layers.0.self_attn.q_proj"])
    with torch.no_grad():
        layer.qalora_B["default"].weight[0] = math.nan  # a row has diverged, and is not left out
    assert math.isnan(layer_changes(model)["offset_change"]["layers.0.self_attn.q_proj"])
    layer.base_layer.scales.zero_()
    assert layer_changes(model) == {}


def test_rows_of_the_log(base, tmp_path):
    model = adapted(base, adapt="both")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4)
    report = Report()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        callbacks=[report],
    )
    trainer.add_callback(FiguresCallback(trainer))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    changes = [row["qalora/offset_change"] for row in logged]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert all(row["qalora/offset_change_max"] >= row["qalora/offset_change"] for row in logged)
    assert logged[-1]["qalora/scale_change"] > 0
    layers = [key for key in report.rows[-2] if key.startswith("qalora/offset_change/")]
    assert len(layers) == 7
    assert not any("/offset_change/" in key for row in logged for key in row)
