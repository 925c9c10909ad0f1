"""Every family that is written to GGUF computes in llama.cpp what it computes in transformers."""

import shutil
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.quickstart.embedded import base_model_path

# of log-probabilities with a spread of 1.2; llama.cpp rounds activations to 8 bits
ROUNDING, DIVERGENCE = 0.25, 2e-3

SIZES: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.15,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES, query_pre_attn_scalar=16),
    "gemma3": Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16),
}


def write_model(config, folder):
    """Write a quantized model of random weights, with the quickstart's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # not all one, or all zero
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "16")
    AutoModelForCausalLM.from_pretrained(
        folder / "16", quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    ).save_pretrained(folder / "int4")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base_model_path() / name, folder / "int4")
    return folder / "int4"


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, qalora, run_export, tmp_path):
    model, out = write_model(FAMILIES[family], tmp_path), tmp_path / "model.gguf"
    qalora("export", model, "--format", "gguf", "--out", out)
    ids = torch.randint(3, 2048, (40,), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(ids[None]).logits[0, -1].log_softmax(-1)
    found = run_export("gguf", out, ids[None])[1]["logprobs"][0]
    divergence = (expected.exp() * (expected - found)).sum().item()
    print(f"{family}: {(found - expected).abs().max():.3f}, divergence {divergence:.1e}")
    assert expected.std() > 1
    assert (found - expected).abs().max() < ROUNDING
    assert divergence < DIVERGENCE
