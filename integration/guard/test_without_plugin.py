"""Without the plugin, transformers must refuse our checkpoints: never a model of random layers."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.mixtures import mixture
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.quickstart.embedded import base_model_path

LOADER = Path(__file__).with_name("load_without_plugin.py")
MIXTURES = ("qwen3_moe", "granitemoe")
CLASSES = {auto.__name__: auto for auto in (AutoModelForCausalLM, AutoModel)}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The quickstart's base and a BERT-type encoder as INT4, by the class that loads them."""
    folder = tmp_path_factory.mktemp("guard")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, num_hidden_layers=2, **sizes)
    BertModel(config).save_pretrained(folder / "bert")
    dense = {"AutoModelForCausalLM": base_model_path(), "AutoModel": folder / "bert"}
    for name, path in dense.items():
        int4 = QALoRAQuantConfig(bits=4, group_size=32)
        model = CLASSES[name].from_pretrained(path, quantization_config=int4)
        model.save_pretrained(folder / name)
    paths = {name: folder / name for name in dense}
    for name in MIXTURES:
        mixture(name).save_pretrained(folder / "dense")
        kept = None if name == "granitemoe" else ["self_attn"]  # the experts alone
        int4 = QALoRAQuantConfig(bits=4, group_size=16, modules_to_not_convert=kept)
        model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=int4)
        model.save_pretrained(folder / name)
        shutil.rmtree(folder / "dense")
        paths[name] = folder / name
    return paths


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        *itertools.product(["bare", "newest"], CLASSES),
        *zip(["bare", "newest"], MIXTURES, strict=True),
    ],
)
def test_stock_transformers_refuses(environment, name, quantized, programs):
    auto_class = name if name in CLASSES else "AutoModelForCausalLM"
    result = json.loads(programs(environment)(LOADER, quantized[name], auto_class))
    assert result["raised"], f"transformers {result['transformers']} returned a model"
    assert "mismatch" in result["raised"], result["raised"]


def test_a_dense_model_still_loads_there(programs):
    # otherwise the refusals above could come from a broken environment
    result = json.loads(programs("bare")(LOADER, base_model_path(), "AutoModelForCausalLM"))
    assert result["raised"] is None
