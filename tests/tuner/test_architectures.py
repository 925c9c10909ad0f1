"""Merged equals unmerged on whole models of several families."""

import pytest
import torch
from peft import get_peft_model
from support.architectures import ARCHITECTURES
from support.layers import quantize

from qalora_plugin import QALoRAConfig
from qalora_plugin.tuner import QALoRALinear

LAYERS = {
    "llama": 14,
    "qwen2": 14,  # with biases, embeddings tied
    "mistral": 14,
    "gemma2": 14,
    "gpt_neox": 8,
    "opt": 12,
    "bert_classifier": 12,
}
GRIDS = {torch.float32: None, torch.bfloat16: None, torch.float64: torch.float64}


def _logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("dtype", GRIDS, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_merged_equals_unmerged(name, dtype, ids, fill_adapters):
    torch.manual_seed(0)
    model = quantize(ARCHITECTURES[name]().to(dtype), bits=3, act_order=True, grid=GRIDS[dtype])
    base = _logits(model, ids)
    model = get_peft_model(model, QALoRAConfig(r=4, adapt="both")).eval()
    assert len(model.targeted_module_names) == LAYERS[name]
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
        assert (_logits(model, ids) - folded).norm() <= 1e-12 * folded.norm()
        return
    merged = model.merge_and_unload()
    assert not any(isinstance(m, QALoRALinear) for m in merged.modules())
    assert torch.equal(_logits(merged, ids), folded)
