"""What a notebook prints: reprs, and PEFT's count of parameters."""

import pytest
from peft import LoraConfig, get_peft_model
from support.layers import quantize
from support.models import llama

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.hf.quantizer import QUANT_METHOD
from qalora_plugin.layers.sharded import ShardedQuantLinear
from qalora_plugin.tuner.counting import install


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_counted_as_weights(bits, capsys):
    install()  # again: counted once
    weights = sum(p.numel() for p in llama().parameters())
    model = get_peft_model(quantize(llama(), bits=bits), QALoRAConfig(r=4))
    adapter = sum(p.numel() for n, p in model.named_parameters() if "qalora_" in n)
    assert model.get_nb_trainable_parameters() == (adapter, weights + adapter)
    model.print_trainable_parameters()
    assert f"all params: {weights + adapter:,}" in capsys.readouterr().out


def test_sharded_layers_are_counted_alike():
    weights = sum(p.numel() for p in llama().parameters())
    model = get_peft_model(quantize(llama(), bits=4), QALoRAConfig(r=4))
    trainable, everything = model.get_nb_trainable_parameters()
    assert everything == weights + trainable
    for layer in model.modules():
        if hasattr(layer, "base_layer") and hasattr(layer.base_layer, "packed"):
            packed = layer.base_layer.packed
            layer.base_layer = ShardedQuantLinear.from_packed(packed)
    assert model.get_nb_trainable_parameters() == (trainable, everything)


def test_other_methods_are_counted_as_before():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in model.parameters())


def test_layers_and_configs_tell_their_grid_and_mode(make_adapted):
    layer = make_adapted({"adapt": "both"}, bits=3, group_size=32)
    text = repr(layer)
    assert "default: r=4, adapt=both, scaling=1.5" in text
    assert "bits=3, group_size=32" in text
    sizes = f"in_features={layer.in_features}, out_features={layer.out_features}"
    assert sizes in text and "(6 groups)" in text
    packed = repr(layer.base_layer.packed)
    assert packed.startswith("PackedWeight(QuantSpec(bits=3, group_size=32, ") and "cpu" in packed
    config = QALoRAQuantConfig(bits=3, dynamic={"down_proj": {"bits": 8}})
    text = "QALoRAQuantConfig(bits=3, group_size=32, dynamic={'down_proj': {'bits': 8}})"
    assert repr(config) == text and QUANT_METHOD not in text
    assert "adapt='scales'" in repr(QALoRAConfig(adapt="scales"))
