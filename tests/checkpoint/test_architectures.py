"""Every kind of architecture: quantize while loading, save, load, same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.base import open_quantized
from qalora_plugin.quant.linear import QuantLinear

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
GROUPED = SIZES | {"num_key_value_heads": 2}
OPT = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64}
TOKENS: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

CASES = {
    "llama": (LlamaConfig(**GROUPED), AutoModelForCausalLM, 14),
    "llama tied": (LlamaConfig(**GROUPED, tie_word_embeddings=True), AutoModelForCausalLM, 14),
    "qwen2 with biases": (Qwen2Config(**GROUPED), AutoModelForCausalLM, 14),
    "qwen3": (Qwen3Config(**GROUPED, head_dim=16), AutoModelForCausalLM, 14),
    "mistral": (MistralConfig(**GROUPED), AutoModelForCausalLM, 14),
    "mixtral": (MixtralConfig(**GROUPED, num_local_experts=2), AutoModelForCausalLM, 8),
    "gemma": (GemmaConfig(**GROUPED, head_dim=16), AutoModelForCausalLM, 14),
    "phi3 fused": (Phi3Config(**GROUPED), AutoModelForCausalLM, 8),
    "opt": (OPTConfig(**OPT), AutoModelForCausalLM, 12),
    "gpt-neox": (GPTNeoXConfig(**SIZES), AutoModelForCausalLM, 8),
    "bert": (BertConfig(**SIZES), AutoModel, 12),
    "bert masked": (BertConfig(**SIZES), AutoModelForMaskedLM, 12),
    "bert classifier": (BertConfig(**SIZES), AutoModelForSequenceClassification, 12),
    "roberta classifier": (RobertaConfig(**SIZES), AutoModelForSequenceClassification, 12),
    "modernbert": (ModernBertConfig(**SIZES, **TOKENS), AutoModelForMaskedLM, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path):
    config, kind, layers = CASES[case]
    torch.manual_seed(0)
    dense = kind.from_config(config).eval()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    dense.save_pretrained(tmp_path / "dense")
    model, info = kind.from_pretrained(
        tmp_path / "dense",
        quantization_config=QALoRAQuantConfig(bits=8, group_size=32),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == layers
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = dense(ids)[0], model(ids)[0]
    # eight bits: close to the dense model, so every weight and bias is where it belongs
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())

    model.save_pretrained(tmp_path / "quantized")
    assert len(open_quantized(tmp_path / "quantized").layers) == layers
    again, info = kind.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    with torch.no_grad():
        # not bit for bit: weights mapped from a file are aligned differently
        torch.testing.assert_close(again(ids)[0], found, rtol=1e-5, atol=1e-6)


def test_a_backbone_from_a_model_with_a_head_and_the_other_way_round(tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(BertConfig(**SIZES)).save_pretrained(
        tmp_path / "dense"
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "dense", quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    )
    model.save_pretrained(tmp_path / "q")
    backbone = AutoModel.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.bert(ids)[0]
        torch.testing.assert_close(backbone(ids)[0], expected, rtol=1e-5, atol=1e-6)
        backbone.save_pretrained(tmp_path / "backbone")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone")
        torch.testing.assert_close(again.bert(ids)[0], expected, rtol=1e-5, atol=1e-6)
    assert type(again.classifier) is torch.nn.Linear
