"""Which parts of a multimodal model stay dense."""

import pytest
import torch
import transformers as tf
from support.architectures import ARCHITECTURES

from qalora_plugin import QALoRAQuantConfig, quantize_model
from qalora_plugin.architecture.blocks import find_blocks, find_towers
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import ConfigError

VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
VIT |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
AUDIO = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
AUDIO |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
MADE = {
    "gemma3_multimodal": (ARCHITECTURES["gemma3_multimodal"], ["model.vision_tower"]),
    "idefics3": (ARCHITECTURES["idefics3"], ["model.vision_model"]),
    "qwen2_5_vl": (
        lambda: tf.Qwen2_5_VLForConditionalGeneration(tf.Qwen2_5_VLConfig()),
        ["model.visual"],
    ),
    "clip": (lambda: tf.CLIPModel(tf.CLIPConfig()), ["vision_model"]),
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT)), []),
    "whisper": (lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**AUDIO)), []),
    "llama": (ARCHITECTURES["llama"], []),
    "t5_encoder": (ARCHITECTURES["t5_encoder"], []),
}


@pytest.mark.parametrize("name", MADE)
def test_towers_are_the_parts_that_see_no_text(name):
    make, towers = MADE[name]
    with torch.device("meta"):
        model = make()
    assert find_towers(model) == towers
    assert not any(find_blocks(model)[0].startswith(f"{tower}.") for tower in towers)


def grids(directory):
    layers = open_quantized(directory).layers.items()
    return {name: spec.bits for name, spec in layers}


@pytest.mark.parametrize("name", ["gemma3_multimodal", "idefics3"])
def test_a_tower_is_quantized_while_loading_where_dynamic_names_it(name, tmp_path):
    make, (tower,) = MADE[name]
    dense = make()
    dense.save_pretrained(tmp_path / "dense")
    auto, plain = tf.AutoModelForImageTextToText, {"bits": 4, "group_size": 16}
    config = QALoRAQuantConfig(**plain)
    auto.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(
        tmp_path / "text"
    )
    assert config.modules_to_not_convert is None  # another model may be loaded with it
    assert set(grids(tmp_path / "text").values()) == {4} and len(grids(tmp_path / "text")) == 14
    listed = open_quantized(tmp_path / "text").config.modules_to_not_convert
    linears = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {n for n in linears if n.startswith(tower)} < set(listed) < linears
    result = quantize_model(tmp_path / "dense", tmp_path / "q", method="rtn", **plain)
    assert grids(result.out) == grids(tmp_path / "text")
    assert sorted(result.kept) == sorted(listed)

    asked = QALoRAQuantConfig(**plain, dynamic={tower.rpartition(".")[2]: {"bits": 8}})
    auto.from_pretrained(tmp_path / "dense", quantization_config=asked).save_pretrained(
        tmp_path / "all"
    )
    found = sorted(grids(tmp_path / "all").values())
    assert found[:14] == [4] * 14 and set(found[14:]) == {8} and len(found) >= 26


def test_an_encoder_of_images_is_quantized_without_text_to_calibrate_on(tmp_path):
    MADE["vit"][0]().save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="ViTForImageClassification: method 'gptq' calibrates"):
        quantize_model(
            tmp_path / "vit", tmp_path / "q", group_size=16, calibration=torch.ones(2, 8)
        )
    result = quantize_model(tmp_path / "vit", tmp_path / "q", group_size=16, method="rtn")
    assert len(result.layers) == 12 and "classifier" in result.kept
