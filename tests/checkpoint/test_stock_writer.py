"""Writing stock GPTQ: nothing is rounded, and what cannot be held is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.config import QALoRAQuantConfig
from qalora_plugin.checkpoint.layout import pack_layer
from qalora_plugin.errors import CheckpointError, ConfigError, OutputError
from qalora_plugin.formats.gptq.write import write_stock_gptq
from qalora_plugin.quantize.rtn import rtn

from .conftest import FIXTURES, STOCK

WITHOUT_ZERO = [path for path in STOCK if "zero0" not in path.name]


def integer_base(directory, bits=4, tied=False):
    """A base in our format with integer zero-points, of layers that stock GPTQ can hold."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype="float16",
    )
    model = LlamaForCausalLM(config)
    quantization = QALoRAQuantConfig(bits, 32, offsets_dtype="float32", method="gptq")
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    for name in [n for n in state if ".layers." in n and "norm" not in n]:
        layer = name.removesuffix(".weight")
        weight = state.pop(name)
        spec = quantization.spec_for(layer, *weight.shape[::-1])
        state |= pack_layer(layer, rtn(weight, spec, name=layer, zero_points="integer"))
    directory.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, directory / "model.safetensors")
    values = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": quantization.to_dict(),
    }
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("source", WITHOUT_ZERO, ids=lambda path: path.name)
def test_stock_to_stock_is_exact(source, version, tmp_path):
    out = write_stock_gptq(source, tmp_path / "out", version)
    old, new = open_quantized(source), open_quantized(out)
    assert new.facts["checkpoint_format"] == version
    # at 3 bits GPTQModel would misread v1 and is made to refuse it, see the writer
    refused = new.config.bits == 3 and version == "gptq"
    assert new.facts["sym"] == ("_sym" in source.name and not refused)
    for name in old.layers:
        a, b = old.layer(name), new.layer(name)
        for field in ("qweight", "scales", "offsets"):
            assert torch.equal(getattr(a, field), getattr(b, field)), (name, field)
        assert torch.equal(new.reader.get(f"{name}.g_idx"), old.reader.get(f"{name}.g_idx"))
    assert (out / "tokenizer.json").exists() and not (out / "reference.safetensors").exists()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_integer_base_gives_the_same_logits(bits, tmp_path):
    source = integer_base(tmp_path / "ours", bits)
    out = write_stock_gptq(source, tmp_path / "stock")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
    assert torch.equal(ours, stock)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["quant_method"]) == (bits, 32, "gptq")
    state = load_file(out / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    assert {n for n in state if n.startswith(layer)} == {
        f"{layer}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }


def test_tied_embeddings_are_written_out(tmp_path):
    source = integer_base(tmp_path / "ours", tied=True)
    out = write_stock_gptq(source, tmp_path / "stock")
    state = load_file(out / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_real_valued_zero_points_are_refused(base_dir, tmp_path):
    source = integer_base(tmp_path / "ours")
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    state[f"{name}.offsets"][0, 0] += 0.25 * state[f"{name}.scales"][0, 0].float()
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: 1 of 64 .*up to 0\.25 away") as error:
        write_stock_gptq(source, tmp_path / "out")
    assert "adapt='scales'" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=r"multiples of 32|not integers"):
        write_stock_gptq(base_dir, tmp_path / "out")


def test_zero_points_out_of_range_are_refused(tmp_path):
    source = integer_base(tmp_path / "ours")
    state = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj"
    state[f"{name}.offsets"][0, 0] = -8 * state[f"{name}.scales"][0, 0].float()  # z = 16
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"to 16; stock GPTQ stores 0 to 15"):
        write_stock_gptq(source, tmp_path / "out")


def test_zero_points_of_zero_need_v2(tmp_path):
    source = FIXTURES / "gptq_4bit_g32_asym_zero0"
    with pytest.raises(CheckpointError, match="zero-points of 0"):
        write_stock_gptq(source, tmp_path / "out")
    out = write_stock_gptq(source, tmp_path / "out", "gptq_v2")
    name = next(iter(open_quantized(out).layers))
    a, b = open_quantized(source).layer(name), open_quantized(out).layer(name)
    assert torch.equal(a.offsets, b.offsets)


def test_other_refusals(tmp_path):
    source = integer_base(tmp_path / "ours")
    with pytest.raises(ConfigError, match="'awq'"):
        write_stock_gptq(source, tmp_path / "out", "awq")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        write_stock_gptq(source, tmp_path / "full")
    assert sorted(os.listdir(tmp_path)) == ["full", "ours"]


@pytest.fixture
def mixed(tmp_path):
    """An integer base whose `down_proj` has eight bits."""

    def make():
        four, eight = integer_base(tmp_path / "4"), integer_base(tmp_path / "8", bits=8)
        state, other = (load_file(d / "model.safetensors") for d in (four, eight))
        name = "model.layers.0.mlp.down_proj"
        state |= {n: t for n, t in other.items() if n.startswith(name)}
        save_file(state, four / "model.safetensors")
        config = json.loads((four / "config.json").read_text())
        config["quantization_config"]["dynamic"] = {name: {"bits": 8}}
        (four / "config.json").write_text(json.dumps(config))
        shutil.rmtree(eight)
        return four

    return make


def test_mixed_widths_need_v2(mixed, tmp_path):
    source = mixed()
    with pytest.raises(ConfigError, match="gptq_v2"):
        write_stock_gptq(source, tmp_path / "out")
    out = open_quantized(write_stock_gptq(source, tmp_path / "out", "gptq_v2"))
    assert out.layers["model.layers.0.mlp.down_proj"].bits == 8
    assert out.layers["model.layers.0.mlp.up_proj"].bits == 4
