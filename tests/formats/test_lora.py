"""An adapter that pools, as plain LoRA in PEFT's own LoRA code."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.random_adapter import PREFIX, random_adapter
from transformers import AutoModelForCausalLM

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import AdapterError, OutputError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.lora.weights import compare
from qalora_plugin.hf.load import load_model
from qalora_plugin.merge.plan import plan_merge
from qalora_plugin.verify.logits import added, logits_of

from .weights import ACT_ORDER, FIXTURES, exact_weight

RANK = 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_peft_computes_base_plus_adapter(bits, quantized, dense_dir, tmp_path):
    source = quantized(bits)
    adapter = random_adapter(source, tmp_path / "adapter")
    result = export_model(adapter, tmp_path / "lora", "lora")
    assert result.layers == 14

    # the base as a plain model in float64, and the adapter's change of its offsets added to it
    base = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float64)
    changed = AutoModelForCausalLM.from_pretrained(dense_dir, dtype=torch.float64)
    ours = load_file(adapter / "adapter_model.safetensors")
    for name, spec in source.layers.items():
        weight = exact_weight(source, name)
        a, b = (ours[f"{PREFIX}{name}.qalora_{x}.weight"].double() for x in "AB")
        change = 2.0 * (b @ a).repeat_interleave(spec.group_size, 1)[:, : spec.in_features]
        base.get_submodule(name).weight.data = weight
        changed.get_submodule(name).weight.data = weight + change
    model = PeftModel.from_pretrained(base, result.out, autocast_adapter_dtype=False).double()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected, found = changed(ids).logits, model(ids).logits
        with model.disable_adapter():
            unadapted = model(ids).logits
    assert (expected - unadapted).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_config_is_plain_lora(quantized, tmp_path):
    source = quantized(4)
    adapter = random_adapter(source, tmp_path / "adapter")
    export_model(adapter, tmp_path / "lora", "lora")
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert (config.peft_type.value, config.r, config.lora_alpha) == ("LORA", RANK, 2 * RANK)
    assert config.base_model_name_or_path == str(source.directory)
    assert "q_proj" in config.target_modules and len(config.target_modules) == 7
    raw = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not {"adapt", "bits", "group_size", "fingerprint"} & set(raw)


def test_act_order_pools_by_g_idx(tmp_path):
    source = open_quantized(ACT_ORDER)
    adapter = random_adapter(source, tmp_path / "adapter")
    export_model(adapter, tmp_path / "lora", "lora")
    ours = load_file(adapter / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in source.layers:
        g_idx = source.layer(name).g_idx
        expected = ours[f"{PREFIX}{name}.qalora_A.weight"][:, g_idx.long()]
        assert torch.equal(theirs[f"{PREFIX}{name}.lora_A.weight"], expected)


@pytest.mark.parametrize("adapt", ["scales", "both"])
def test_changed_scales_are_refused(adapt, quantized, tmp_path):
    adapter = random_adapter(quantized(4), tmp_path / "adapter", adapt)
    with pytest.raises(AdapterError, match="no low-rank change"):
        export_model(adapter, tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()


def test_an_adapter_in_bf16_of_another_convention_is_exact(tmp_path):
    """B times 3/32, of PEFT's mean over 3 groups of 32, has more digits than bf16 holds."""
    adapter, base = tmp_path / "adapter", FIXTURES / "gptq_4bit_g32_sym"
    shutil.copytree(FIXTURES / "use_qalora_adapter", adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    stored = {key: value.bfloat16() for key, value in stored.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    out = export_model(adapter, tmp_path / "lora", "lora", base=base).out
    assert compare(out, adapter, base, None)[2] < 1e-6


def test_nothing_is_overwritten(quantized, tmp_path):
    adapter = random_adapter(quantized(4), tmp_path / "adapter")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="not empty"):
        export_model(adapter, tmp_path / "lora", "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["mine"]


def test_the_base_may_have_moved(
    quantized,
    tmp_path,
    monkeypatch,
    capsys,
):
    """The adapter's config has a path relative to where it was trained."""
    source = quantized(4)
    adapter = random_adapter(source, tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    text = json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "models/base"})
    config.write_text(text)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(source.directory)
    monkeypatch.chdir(tmp_path)
    result = export_model(adapter, tmp_path / "lora", "lora")
    record = json.loads((result.out / "qalora_export.json").read_text())
    assert record["source"]["base"] == "base"
    (tmp_path / "models" / "base").rename(tmp_path / "moved")
    command = ["verify", str(result.out), "--against", str(adapter), "--no-run"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "adapter_config.json: its base_model_name_or_path" in message and "--base" in message
    assert main([*command, "--base", "moved"]) == 0
    assert "verified, format lora" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["short last group", "act-order", "groups of 48"])
def test_the_reference_of_verify_pools_as_the_adapter_does(base, quantized, tmp_path):
    """Base plus adapter by the formula, which the runtime is compared with, is what we train."""
    sizes = {"short last group": 32, "groups of 48": 48}
    source = open_quantized(ACT_ORDER) if base == "act-order" else quantized(4, sizes[base])
    random_adapter(source, tmp_path / "adapter", rank=8, size=0.2)
    plan = plan_merge(tmp_path / "adapter", source.directory)
    ids = torch.arange(24).view(2, 12)
    trained = PeftModel.from_pretrained(load_model(source), tmp_path / "adapter").eval()
    model = load_model(source)
    plain, expected = logits_of(model, ids), logits_of(trained, ids)
    with added(model, plan, None):
        found = logits_of(model, ids)
    effect = (expected - plain).abs().max().item()  # training rounds its offsets to fp16
    torch.testing.assert_close(found, expected, atol=0.01 * effect, rtol=0)
