"""Mixtures of experts through training, merging, verifying, and back into a stock GPTQ file."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.mixtures import LINEARS, mixture
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, merge_adapter, quantize_model, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.format import exports
from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.export import check_format, export_model
from qalora_plugin.formats.gptq.write import write_stock_gptq

IDS = torch.arange(3, 35).view(2, 16)
BITS = {
    "qwen3_moe": 2, "mixtral": 3, "olmoe": 4, "qwen2_moe": 8, "deepseek_v3": 4, "granitemoe": 3,
}  # fmt: skip


def _load(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def _trained(base, out, **settings):
    """Train an adapter a little, save it, and return the logits of the trained model."""
    config = QALoRAConfig(r=4, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(_load(base), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(out)
    return _logits(model.eval())


@pytest.mark.parametrize("name", BITS)
def test_merged_equals_unmerged(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "dense")
    grid = dict(bits=BITS[name], group_size=16, method="rtn", progress=False)
    result = quantize_model(tmp_path / "dense", tmp_path / "base", **grid)
    assert len(result.layers) == LINEARS[name]
    trained = _trained(tmp_path / "base", tmp_path / "adapter", adapt="both")
    again = PeftModel.from_pretrained(_load(tmp_path / "base"), tmp_path / "adapter")
    adapted = again.targeted_module_names
    assert len(adapted) == LINEARS[name] and not any("router" in n for n in adapted)
    assert torch.equal(_logits(again), trained)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    report = verify_merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "base")
    assert report.layers == LINEARS[name] and report.unadapted_layers == 0
    assert torch.equal(_logits(_load(tmp_path / "merged")), trained)
    again.merge_and_unload().save_pretrained(tmp_path / "unloaded")
    assert torch.equal(_logits(_load(tmp_path / "unloaded")), trained)
    for format in exports():
        if not (format.holds_experts or format.of_adapter):
            with pytest.raises(CheckpointError, match="part of a mixture of experts"):
                export_model(tmp_path / "merged", tmp_path / "out", format.name)
            with pytest.raises(CheckpointError, match="part of a mixture of experts"):
                check_format(tmp_path / "base", format.name, format.adapts[0])
    assert not (tmp_path / "out").exists()


def test_experts_alone_or_attention_alone(tmp_path):
    mixture("qwen3_moe").save_pretrained(tmp_path / "dense")
    quantize_model(tmp_path / "dense", tmp_path / "base", method="rtn", group_size=16)
    for number, targets in enumerate([["gate_proj", "up_proj"], ["q_proj", "o_proj"]]):
        adapter, merged = tmp_path / f"adapter{number}", tmp_path / f"merged{number}"
        trained = _trained(tmp_path / "base", adapter, target_modules=targets)
        merge_adapter(adapter, merged)
        verify_merge(merged, adapter, tmp_path / "base")
        assert torch.equal(_logits(_load(merged)), trained)
        with pytest.raises(CheckpointError, match="part of a mixture of experts"):
            export_model(adapter, tmp_path / "lora", "lora")


def test_a_stock_mixture_is_written_back(tmp_path):
    mixture("mixtral", inner=64).save_pretrained(tmp_path / "dense")
    kept = {"modules_to_not_convert": ["self_attn"]}
    grid = dict(method="rtn", group_size=32, zero_points="integer", progress=False)
    quantize_model(tmp_path / "dense", tmp_path / "q", **grid, **kept)
    write_stock_gptq(tmp_path / "q", tmp_path / "stock")
    trained = _trained(tmp_path / "stock", tmp_path / "adapter", adapt="scales")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    verify_merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "stock")
    assert torch.equal(_logits(_load(tmp_path / "merged")), trained)
    export_model(tmp_path / "merged", tmp_path / "back", "original")
    assert open_quantized(tmp_path / "back").format == "gptq"
    assert torch.equal(_logits(_load(tmp_path / "back")), trained)
