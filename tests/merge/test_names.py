"""Adapters of models whose layers transformers renames while it loads a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from qalora_plugin import (
    QALoRAConfig,
    merge_adapter,
    quantize_model,
    verify_merge,
)
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import AdapterError
from qalora_plugin.merge.adapter import open_adapter

Make = Callable[..., Path]
IDS = torch.arange(10)[None]
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma():
    config = Gemma3Config(
        text_config=TEXT,
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        image_token_index=60,
    )
    return Gemma3ForConditionalGeneration(config)


def _llava():
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
        image_token_index=60,
    )
    return LlavaForConditionalGeneration(config)


def _qwen():
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    return Qwen2VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma": _gemma,
    "llava": _llava,
    "qwen": _qwen,
}


CASES = [
    ("gemma", "quantize_model", None),
    ("gemma", "loading", ["embed_tokens"]),
    ("gemma", "loading", ["lm_head"]),
    ("llava", "loading", None),
    ("qwen", "loading", None),
]


@pytest.mark.parametrize(("name", "quantized", "modules_to_save"), CASES)
def test_vision_language_model(name, quantized, modules_to_save, quantize, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    base = quantize(model)
    if quantized == "quantize_model":
        options = {"group_size": 16, "method": "rtn", "progress": False}
        dense, base = base.with_name("dense"), tmp_path / "base"
        quantize_model(dense, base, **options)
    config = QALoRAConfig(r=2, init_lora_weights=False, modules_to_save=modules_to_save)
    trained: Any = get_peft_model(type(model).from_pretrained(base), config).eval()
    for parameter_name, parameter in trained.named_parameters():
        if "modules_to_save" in parameter_name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    trained.save_pretrained(tmp_path / "adapter")
    layer = "model.language_model.layers.0.mlp.up_proj"
    assert layer in open_adapter(tmp_path / "adapter").layers
    assert layer not in open_quantized(base).layers
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    merged = type(model).from_pretrained(result.out).eval()
    with torch.no_grad():
        found, wanted = merged(input_ids=IDS).logits, trained(input_ids=IDS).logits
    # not equal: dense layers that lie unaligned in a file may round differently
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    report = verify_merge(result.out, tmp_path / "adapter", base, logits=True)
    assert report.logits is not None and report.logits.equal
    assert (report.layers, report.unadapted_layers) == (result.layers, 0)


def test_other_base_of_renamed_layers_is_refused(quantize, tmp_path):
    bases = []
    for seed in range(2):
        torch.manual_seed(seed)
        bases.append(quantize(_llava()))
    model = LlavaForConditionalGeneration.from_pretrained(bases[0])
    get_peft_model(model, QALoRAConfig(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="fingerprint"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", bases[1])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", bases[0])
