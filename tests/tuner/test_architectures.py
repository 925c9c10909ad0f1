"""Merged equals unmerged on whole models of several families."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qalora_plugin import QALoRAConfig
from qalora_plugin.tuner import QALoRALinear

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
OPT = {"hidden_size": 64, "ffn_dim": 172, "num_hidden_layers": 2, "num_attention_heads": 4}

# name -> (model, quantized layers)
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)), 14),
    "llama_tied": (
        lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        14,
    ),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)), 14),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**GROUPED)), 14),
    "gemma": (lambda: GemmaForCausalLM(GemmaConfig(**GROUPED, head_dim=16)), 14),
    "gpt_neox": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE)), 8),
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(**OPT, vocab_size=100, word_embed_proj_dim=64)),
        12,
    ),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)), 13),
}
GRIDS = {torch.float32: None, torch.bfloat16: None, torch.float64: torch.float64}


def _logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", GRIDS, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merged_equals_unmerged(name, dtype, ids, quantize_linears, fill_adapters):
    torch.manual_seed(0)
    build, layers = MODELS[name]
    model = quantize_linears(build().to(dtype), bits=3, act_order=True, grid=GRIDS[dtype])
    base = _logits(model, ids)
    model = get_peft_model(model, QALoRAConfig(r=4, adapt="both")).eval()
    assert len(model.targeted_module_names) == layers
    if dtype != torch.float64:  # there s * (o / s) is o only to the last bit of float64
        assert torch.equal(_logits(model, ids), base)
    fill_adapters(model)
    if dtype == torch.float64:
        model.double()
    folded = _logits(model, ids)
    assert not torch.equal(folded, base)

    model.merge_adapter()
    assert torch.equal(_logits(model, ids), folded)
    model.unmerge_adapter()
    assert torch.equal(_logits(model, ids), folded)
    with model.disable_adapter():
        assert torch.equal(_logits(model, ids), base)
    if dtype == torch.float64:
        for layer in model.modules():
            if isinstance(layer, QALoRALinear):
                layer.additive = True
        added = _logits(model, ids)
        assert (added - folded).norm() <= 1e-12 * folded.norm()
        return
    merged = model.merge_and_unload()
    assert not any(isinstance(m, QALoRALinear) for m in merged.modules())
    assert torch.equal(_logits(merged, ids), folded)


@torch.no_grad()
def test_additive_in_fp32(make_llama, make_peft, ids):
    model = make_peft(make_llama(grid=torch.float32), adapt="both")
    folded = _logits(model, ids)
    for layer in model.modules():
        if isinstance(layer, QALoRALinear):
            layer.additive = True
    assert (_logits(model, ids) - folded).norm() <= 1e-5 * folded.norm()
