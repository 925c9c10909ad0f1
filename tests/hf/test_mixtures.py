"""Mixtures of experts: quantized while they load, saved, and loaded as stock GPTQ."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixtures import LINEARS, MIXTURES, mixture
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, quantize_model
from qalora_plugin.architecture.experts import Experts
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.formats.gptq.write import write_stock_gptq
from qalora_plugin.layers.linear import QuantLinear

IDS = torch.arange(3, 35).view(2, 16)
OWN = {
    "mixtral": ("block_sparse_moe.experts.3.w1", "mlp.experts.3.w1"),
    "granitemoe": ("block_sparse_moe.experts.3.up_proj",) * 2,
}


def _logits(model):
    with torch.no_grad():
        return model(IDS).logits


def _fused(model, directory):
    """Compute the logits of the dequantized weights in transformers' own fused experts."""
    plain = model.dequantize(dtype=torch.float32)
    assert not any(isinstance(module, Experts) for module in plain.modules())
    plain.save_pretrained(directory)
    again, info = AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.allclose(_logits(plain), _logits(again), atol=1e-5)
    return _logits(again)


@pytest.mark.parametrize("name", MIXTURES)
def test_round_trip(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "dense")
    grid = QALoRAQuantConfig(bits=3, group_size=16)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=grid, output_loading_info=True
    )
    assert not any(info.values()), info
    layers = [n for n, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert len(layers) == LINEARS[name] and not any("gate" in n.split(".") for n in layers)
    found = _logits(model)
    model.save_pretrained(tmp_path / "q")
    stored, own = OWN.get(name, ("mlp.experts.3.up_proj",) * 2)
    layer = open_quantized(tmp_path / "q").layer(f"model.layers.1.{stored}")
    assert torch.equal(layer.qweight, model.get_submodule(f"model.layers.1.{own}").qweight)
    assert describe(tmp_path / "q")["valid"]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(_logits(again), found)
    torch.testing.assert_close(_fused(model, tmp_path / "plain"), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_stock_gptq(name, tmp_path):
    mixture(name, inner=64).save_pretrained(tmp_path / "dense")
    rounded = dict(method="rtn", group_size=32, zero_points="integer", progress=False)
    narrow = ["self_attn"] if name == "deepseek_v3" else ["k_proj", "v_proj"]  # 16 outputs
    kept = {"modules_to_not_convert": narrow}
    quantize_model(tmp_path / "dense", tmp_path / "q", **rounded, **kept)
    write_stock_gptq(tmp_path / "q", tmp_path / "stock")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "stock", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    found = describe(tmp_path / "stock")
    assert found["valid"] and found["kind"] == "gptq model"
    logits = _logits(model)
    torch.testing.assert_close(_fused(model, tmp_path / "plain"), logits, rtol=0, atol=1e-5)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    torch.testing.assert_close(_logits(ours), logits, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"experts\.0\.\w+ is part of a mixture"):
        quantize_model(tmp_path / "dense", tmp_path / "g", format="gptq", **rounded)


def test_experts_alone(tmp_path):
    """Without the plugin transformers overlooks GraniteMoE's, and would fill in random ones."""
    attention = {"modules_to_not_convert": ["self_attn"]}
    grid = QALoRAQuantConfig(bits=4, group_size=16, **attention)
    for name in ("granitemoe", "mixtral"):
        mixture(name).save_pretrained(tmp_path / name)
    mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", quantization_config=grid)
    assert sum(isinstance(m, QuantLinear) for m in mixed.modules()) == 48
    with pytest.raises(ConfigError, match="experts alone cannot be quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "granitemoe", quantization_config=grid)
    with pytest.raises(ConfigError, match="experts alone cannot be quantized"):
        quantize_model(tmp_path / "granitemoe", tmp_path / "q", method="rtn", **attention)


def test_stock_gptq_of_experts_alone_is_refused(tmp_path):
    """What is saved of it in our format would load with random experts without the plugin."""
    mixture("granitemoe", inner=64).save_pretrained(tmp_path / "dense")
    rounded = dict(method="rtn", group_size=32, zero_points="integer", progress=False)
    kept = {"modules_to_not_convert": ["k_proj", "v_proj"]}
    quantize_model(tmp_path / "dense", tmp_path / "q", **rounded, **kept)
    write_stock_gptq(tmp_path / "q", tmp_path / "stock")
    stock, dense = (load_file(tmp_path / n / "model.safetensors") for n in ("stock", "dense"))
    alone = {name: tensor for name, tensor in stock.items() if ".self_attn." not in name}
    alone |= {name: tensor for name, tensor in dense.items() if ".self_attn." in name}
    save_file(alone, tmp_path / "stock" / "model.safetensors", {"format": "pt"})
    (tmp_path / "stock" / "qalora_manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"stock.*experts alone cannot be quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    found = describe(tmp_path / "stock")
    assert not found["valid"] and "experts alone" in found["problem"]


def test_other_dispatch_is_refused(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path)
    grid = QALoRAQuantConfig(bits=4, group_size=16)
    with pytest.raises(ConfigError, match="experts_implementation 'batched_mm'"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=grid, experts_implementation="batched_mm"
        )
