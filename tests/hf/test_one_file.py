"""A model that is one file goes wherever a directory goes."""

import json

import pytest
import torch
from support.gguf_files import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.layers.linear import QuantLinear


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A GGUF file, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    return write_gguf(tmp_path / "repo" / "model.gguf")


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, LlamaForCausalLM])
def test_from_pretrained_takes_the_file(file, model_class):
    model = model_class.from_pretrained(str(file))
    assert isinstance(model, LlamaForCausalLM)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    source = open_quantized(file)
    assert layers.keys() == source.layers.keys()
    for name, module in layers.items():
        assert torch.equal(module.packed.dequantize(), source.layer(name).dequantize())
    assert AutoConfig.from_pretrained(file).hidden_size == model.config.hidden_size
    assert AutoTokenizer.from_pretrained(str(file)).eos_token == "<|end|>"
    assert AutoTokenizer.from_pretrained(model.name_or_path).eos_token == "<|end|>"


def test_gguf_file_beside_our_config(file):
    ours = QALoRAQuantConfig()
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=ours
    )
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    dense = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    assert not any(isinstance(module, QuantLinear) for module in dense.modules())


def test_imported_once_and_again_when_it_changes(file, tmp_path):
    AutoConfig.from_pretrained(file)
    (first,) = (tmp_path / "cache" / "qalora-plugin" / "bases").glob("model-*")
    AutoConfig.from_pretrained(file)
    write_gguf(file, kind="Q5_1")
    AutoConfig.from_pretrained(file)
    found = list((tmp_path / "cache" / "qalora-plugin" / "bases").glob("model-*"))
    assert len(found) == 2 and first in found


def test_a_directory_of_one_file_is_that_file(file, tmp_path):
    assert open_quantized(file.parent).directory == file
    write_gguf(file.with_name("other.gguf"))
    with pytest.raises(CheckpointError, match=r"holds 2 models.*model\.gguf, .*other\.gguf"):
        open_quantized(file.parent)
    with pytest.raises(CheckpointError, match=r"none\.gguf: no such file"):
        AutoModelForCausalLM.from_pretrained(str(tmp_path / "none.gguf"))


def test_plan_reads_it(file, capsys):
    assert cli(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["bits"] == 4


def test_a_dense_model_of_it_names_the_way(file):
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    from peft import get_peft_model

    with pytest.raises(ConfigError, match=r"qalora import FILE --out DIR"):
        get_peft_model(model, QALoRAConfig())
