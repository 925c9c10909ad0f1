"""Bases with numbers or sizes that no model can have, at every door."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, merge_adapter, quantize_model
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, QALoRAError
from qalora_plugin.formats.export import export_model

DOWN = "model.layers.0.mlp.down_proj"
NOT_FINITE = {
    "NaN in the embedding": ("model.embed_tokens.weight", float("nan")),
    "NaN in the head": ("lm_head.weight", float("nan")),
    "infinity in a norm": ("model.norm.weight", float("inf")),
    "minus infinity in a norm": ("model.layers.1.input_layernorm.weight", float("-inf")),
    "NaN in the last row": ("lm_head.weight", float("nan")),
}


@pytest.fixture
def changed(tmp_path):
    """Copy a directory, change its tensors."""

    def make(source, change):
        target = shutil.copytree(source, tmp_path / "changed")
        (target / "qalora_manifest.json").unlink(missing_ok=True)
        state = load_file(target / "model.safetensors")
        change(state)
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return target

    return make


def refused_everywhere(directory, make_adapter, tmp_path, why):
    """Assert that nothing takes a quantized base."""
    adapter = make_adapter(directory)
    doors = {
        "merge": lambda: merge_adapter(adapter, tmp_path / "out"),
        "export": lambda: export_model(directory, tmp_path / "out", "torchao"),
        "load": lambda: AutoModelForCausalLM.from_pretrained(directory),
    }
    for door, go in doors.items():
        with pytest.raises(QALoRAError, match=why):
            go()
        assert not (tmp_path / "out").exists(), door
    found = describe(directory)
    assert not found["valid"] and found["problem"]


@pytest.mark.parametrize("case", NOT_FINITE)
def test_numbers_that_are_not_finite(case, base_dir, changed, make_adapter, tmp_path):
    name, value = NOT_FINITE[case]

    def spoil(state):
        state[name].view(-1)[-1 if "last" in case else 3] = value

    directory = changed(base_dir, spoil)
    refused_everywhere(directory, make_adapter, tmp_path, f"{name} holds NaN or infinity")


def test_a_16_bit_model_with_nan_is_not_quantized(dense_dir, changed, tmp_path):
    directory = changed(
        dense_dir, lambda state: state["model.embed_tokens.weight"][5].fill_(torch.nan)
    )
    with pytest.raises(QALoRAError, match="NaN or infinity"):
        quantize_model(directory, tmp_path / "q", method="rtn", group_size=32, progress=False)
    with pytest.raises(QALoRAError, match="NaN or infinity"):
        AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=QALoRAQuantConfig(bits=4)
        )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("inputs", [171, 173, 176, 191])  # as many words and groups as 172
def test_a_guard_of_another_length(inputs, base_dir, changed, make_adapter, tmp_path):
    directory = changed(base_dir, lambda state: state[f"{DOWN}.weight"].fill_(inputs))
    refused_everywhere(directory, make_adapter, tmp_path, "172|171|in_features|inputs")


@pytest.mark.parametrize("settings", [{"vocab_size": 65}, {"intermediate_size": 171}])
def test_sizes_in_config_that_are_not_the_tensors(
    settings, base_dir, changed, make_adapter, tmp_path
):
    directory = changed(base_dir, lambda state: None)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(CheckpointError, match="expected shape"):
        merge_adapter(make_adapter(directory), tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected shape"):
        export_model(directory, tmp_path / "out", "torchao")
    assert not describe(directory)["valid"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"head_dim": 2**40},
        {"mlp_bias": "no"},
        {"hidden_size": -64},
        {"num_attention_heads": 0},
    ],
)
def test_sizes_and_types_that_no_model_can_have(
    settings, base_dir, changed, make_adapter, tmp_path, capsys
):
    directory = changed(base_dir, lambda state: None)
    adapter = make_adapter(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    started = time.process_time()
    with pytest.raises(QALoRAError, match=r"config\.json"):
        merge_adapter(adapter, tmp_path / "out")
    assert cli(["plan", str(directory)]) == cli(["inspect", str(directory)]) == 1
    assert time.process_time() - started < 10 and not (tmp_path / "out").exists()
