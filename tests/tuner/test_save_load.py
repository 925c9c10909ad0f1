"""Adapters on disk: PEFT's layout, the same numbers back, and every kind of wrong file refused."""

import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from support.adapters import edit_json
from support.architectures import ARCHITECTURES
from support.layers import quantize
from support.models import llama
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.checkpoint.fingerprint import fingerprint
from qalora_plugin.errors import AdapterError, ConfigError
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.tuner import QALoRALinear

FILE = "adapter_model.safetensors"


def rewrite(tensors, directory):
    """Write an adapter's tensors as an earlier release did, without a manifest."""
    save_file(tensors, directory / FILE)
    (directory / "qalora_manifest.json").unlink()


@pytest.fixture
def saved(make_peft, ids, tmp_path):
    """(directory of an adapter on `make_llama()`, its logits)."""
    model = make_peft(adapt="both")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        return tmp_path, model(ids).logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@torch.no_grad()
def test_round_trip(saved, make_llama, ids, low_cpu_mem_usage):
    directory, logits = saved
    stored = load_file(directory / FILE)
    prefix = "base_model.model.model.layers.0.mlp.down_proj."
    assert {key: stored[prefix + key].shape for key in ("qalora_A.weight", "qalora_B.weight")} == {
        "qalora_A.weight": (4, 11),
        "qalora_B.weight": (64, 4),
    }
    assert len(stored) == 14 * 4
    model = PeftModel.from_pretrained(make_llama(), directory, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(model(ids).logits, logits)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    trained = PeftModel.from_pretrained(make_llama(), directory, is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())


def test_a_base_on_this_disk_is_saved_by_its_whole_path(make_peft, tmp_path, monkeypatch):
    model = make_peft()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for given, saved in (("base", str(tmp_path / "base")), ("org/name", "org/name")):
        model.active_peft_config.base_model_name_or_path = given
        model.save_pretrained("adapter")
        config = QALoRAConfig.from_pretrained("adapter")
        assert config.base_model_name_or_path == saved


def test_adapter_in_bf16_is_fp32_in_memory(saved, make_llama):
    directory, _ = saved
    low = {key: value.bfloat16() for key, value in load_file(directory / FILE).items()}
    rewrite(low, directory)
    for low_cpu in (False, True):
        model = PeftModel.from_pretrained(
            make_llama(), directory, low_cpu_mem_usage=low_cpu, autocast_adapter_dtype=False
        )
        for key, value in get_peft_model_state_dict(model).items():
            assert value.dtype == torch.float32
            assert torch.equal(value, low[key].float())


def test_adapter_on_a_bf16_model_is_not_rounded(saved, make_llama):
    """PEFT moves a loaded adapter to the dtype of the base layer's weight, where it has one."""
    directory, _ = saved
    stored = load_file(directory / FILE)
    model = PeftModel.from_pretrained(make_llama().bfloat16(), directory, low_cpu_mem_usage=True)
    for key, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, stored[key]), key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t, key: t.pop(key),
            r"missing key .*0\.self_attn\.q_proj\.qalora_A\.default\.weight \(1 of 56\)",
        ),
        (
            lambda t, key: t.update({key.replace("A.w", "C.w"): t[key].clone()}),
            r"unexpected key .*q_proj\.qalora_C",
        ),
        (
            lambda t, key: t.update({key: t[key][:2].contiguous()}),
            r"qalora_A.*expected shape \(4, 4\), found \(2, 4\)",
        ),
        (lambda t, key: t.clear(), "missing every key"),
    ],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_wrong_tensors_are_errors(saved, make_llama, damage, message, low_cpu_mem_usage):
    directory, _ = saved
    tensors = load_file(directory / FILE)
    damage(tensors, "base_model.model.model.layers.0.self_attn.q_proj.qalora_A.weight")
    rewrite(tensors, directory)
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(make_llama(), directory, low_cpu_mem_usage=low_cpu_mem_usage)


def test_loras_tensors_under_our_config_are_an_error(saved, make_llama):
    directory, _ = saved
    tensors = load_file(directory / FILE)
    rewrite({k.replace("qalora_", "lora_"): v for k, v in tensors.items()}, directory)
    with pytest.raises(AdapterError, match="unexpected key"):
        PeftModel.from_pretrained(make_llama(), directory)


def test_second_adapter_is_checked_too(saved, make_llama, ids):
    directory, logits = saved
    model = PeftModel.from_pretrained(make_llama(), directory)
    model.load_adapter(directory, "second")
    model.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    tensors = load_file(directory / FILE)
    tensors.popitem()
    rewrite(tensors, directory)
    with pytest.raises(AdapterError, match="adapter 'third': missing key"):
        model.load_adapter(directory, "third")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"bits": 3}, "bits=4, found a base with bits=3"),
        ({"group_size": 32}, "group_size=16, found a base with group_size=32"),
    ],
)
def test_other_base_is_refused(saved, make_llama, base, message):
    directory, _ = saved
    with pytest.raises(AdapterError, match=message):
        PeftModel.from_pretrained(make_llama(**base), directory)


def test_other_integers_are_refused(saved, make_llama):
    directory, _ = saved
    model = make_llama()
    model.model.layers[1].mlp.up_proj.qweight[0, 0] += 1
    found = r"fingerprint='[0-9a-f]{32}', found a base with fingerprint='[0-9a-f]{32}'"
    with pytest.raises(AdapterError, match=found):
        PeftModel.from_pretrained(model, directory)


def test_an_adapter_of_no_known_base_is_told_of(saved, make_llama, caplog):
    directory, _ = saved
    PeftModel.from_pretrained(make_llama(), directory)
    assert "fingerprint" not in caplog.text
    edit_json(directory, fingerprint=None)
    PeftModel.from_pretrained(make_llama(), directory)
    assert "adapter_config.json: fingerprint: found none" in caplog.text


def test_fingerprint_is_computed_and_not_believed(make_llama):
    model = make_llama()
    model.config.quantization_config = QALoRAQuantConfig(
        bits=4, group_size=16, base={"fingerprint": "0" * 32}
    )
    stored = get_peft_model(model, QALoRAConfig(r=2)).peft_config["default"]
    assert stored.fingerprint == fingerprint(
        (name, module.qweight)
        for name, module in make_llama().named_modules()
        if isinstance(module, QuantLinear)
    )


def test_modules_to_save(fill_adapters, ids, tmp_path):
    def build():
        torch.manual_seed(0)
        return quantize(ARCHITECTURES["bert_classifier"]())

    config = QALoRAConfig(r=2, task_type="SEQ_CLS", modules_to_save=["classifier"])
    model = get_peft_model(build(), config).eval()
    fill_adapters(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(0.1)
        logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / FILE)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)
        merged = loaded.merge_and_unload()
        assert torch.equal(merged(ids).logits, logits)
    assert type(merged.classifier) is torch.nn.Linear


def test_several_adapters(make_peft, ids, fill_adapters):
    model = make_peft()
    model.add_adapter("other", QALoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    fill_adapters(model, seed=5)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not any(".other." in name for name in trainable)
    outputs = {}
    with torch.no_grad():
        for name in ("default", "other"):
            model.set_adapter(name)
            outputs[name] = model(ids).logits
        with model.disable_adapter():
            outputs["__base__"] = model(ids).logits
        assert len({float(value.sum()) for value in outputs.values()}) == 3
        for names in (["other", "default"], ["__base__", "other"]):
            mixed = model(input_ids=ids, adapter_names=names).logits
            for row, name in enumerate(names):
                torch.testing.assert_close(mixed[row], outputs[name][row], rtol=1e-5, atol=1e-5)
        # the hooks are gone again
        assert torch.equal(model(ids).logits, outputs["other"])
        with pytest.raises(ValueError, match="nobody"):
            model(input_ids=ids, adapter_names=["nobody", "other"])
        with pytest.raises(ValueError, match="inference"):
            model.train()(input_ids=ids, adapter_names=["default", "other"])
        model.eval().delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, outputs["default"])
    assert not any(".other." in name for name in model.state_dict())


def test_mixed_batch_generates(make_peft, ids):
    model = make_peft()
    options = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    wanted = model.generate(**options)
    mixed = model.generate(**options, adapter_names=["default", "__base__"])
    assert torch.equal(mixed[0], wanted[0])


@torch.no_grad()
def test_through_transformers_from_disk(fill_adapters, ids, tmp_path):
    """A base on disk, AutoPeftModel, merge_and_unload, save_pretrained, and the merged model."""
    plain, base, adapter, merged = (str(tmp_path / name) for name in "pbam")
    llama(num_hidden_layers=1).save_pretrained(plain)
    quantization = QALoRAQuantConfig(bits=4, group_size=16)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization)
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, QALoRAConfig(r=4, task_type="CAUSAL_LM", adapt="both")).eval()
    fill_adapters(model)
    logits = model(ids).logits
    model.save_pretrained(adapter)
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["bits"] == 4

    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert torch.equal(loaded(ids).logits, logits)
    loaded.merge_and_unload().save_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert not any(isinstance(m, QALoRALinear) for m in model.modules())
    assert torch.equal(model(ids).logits, logits)
    assert model.config.quantization_config.merged["adapt"] == "both"

    with pytest.raises(AdapterError, match="base_merged=None, found a base with base_merged="):
        PeftModel.from_pretrained(model, adapter)
    with pytest.raises(ConfigError, match="bits=4, group_size=16"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), adapter)
    # the same 16-bit model, quantized again in the same way, is the same base
    again = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization)
    assert torch.equal(PeftModel.from_pretrained(again, adapter)(ids).logits, logits)


def test_state_dict_of_the_base_alone(make_peft):
    model = make_peft()
    adapter = get_peft_model_state_dict(model)
    base = {key: value for key, value in model.state_dict().items() if "qalora_" not in key}
    result = model.load_state_dict(base, strict=False)
    assert len(result.missing_keys) == 14 * 2 and not result.unexpected_keys
    after = get_peft_model_state_dict(model)
    assert all(torch.equal(after[key], value) for key, value in adapter.items())
    with pytest.raises(RuntimeError, match=r"Missing key.*qalora_A"):
        model.load_state_dict(base)


def test_state_dict_of_a_model_with_tied_embeddings(make_llama, make_peft):
    """DeepSpeed and Accelerate load it to resume; both names of the tied weight are in it."""
    base = make_llama()
    base.lm_head.weight = base.model.embed_tokens.weight
    model = make_peft(base)
    state = model.state_dict()
    assert "base_model.model.lm_head.weight" in state
    model.load_state_dict(state)
