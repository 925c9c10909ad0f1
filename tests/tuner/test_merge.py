"""Merging in memory: what is refused, what is recorded, what comes back."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.errors import AdapterError
from qalora_plugin.layers.sharded import ShardedQuantLinear
from qalora_plugin.tuner import QALoRALinear


def _last_layer(model):
    return model.base_model.model.model.layers[1].mlp.down_proj


def _buffers(model):
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith(("scales", "offsets"))}


@pytest.mark.parametrize("shape", [(0,), (64, 0)])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_partitioned_adapter_is_refused_before_anything_changes(make_peft, method, shape):
    """ZeRO-3 leaves an empty tensor of shape (0,) in place of each parameter."""
    model = make_peft()
    before = _buffers(model)
    _last_layer(model).qalora_B["default"].weight = nn.Parameter(torch.empty(shape))
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj\.qalora_B.*ZeRO-3"):
        getattr(model, method)()
    after = _buffers(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_base_that_was_loaded_to_be_sharded_is_refused(make_adapted):
    adapted = make_adapted()
    adapted.base_layer = ShardedQuantLinear.from_packed(adapted.base_layer.packed)
    for merge in (adapted.check_merge, adapted.merge):
        with pytest.raises(AdapterError, match=r"loaded to be sharded \(ZeRO-3, FSDP\)"):
            merge()
    assert not adapted.merged


def test_an_adapter_that_is_named_twice_is_merged_once(make_adapted):
    adapted, x = make_adapted(), torch.randn(3, 172)
    y = adapted(x)
    adapted.merge(adapter_names=["default", "default"])
    assert adapted.merged_adapters == ["default"]
    assert torch.equal(adapted(x), y)


def test_nan_is_refused(make_peft):
    model = make_peft()
    _last_layer(model).qalora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"down_proj\.qalora_A.*NaN"):
        model.merge_adapter()


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (
            "qalora_B",
            1e8,
            r"layers\.1\.mlp\.down_proj.*offsets: expected finite numbers, found",
        ),
        ("qalora_scale_B", 1e8, r"layers\.1\.mlp\.down_proj.*scales: expected finite"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_anything_changes(
    make_peft, method, attribute, value, message
):
    """As `qalora merge` refuses it. The layer is the last: the others must not be merged."""
    model = make_peft(adapt="both")
    getattr(_last_layer(model), attribute)["default"].weight.data.fill_(value)
    if attribute == "qalora_scale_B":
        _last_layer(model).qalora_scale_A["default"].weight.data.abs_()
    before = _buffers(model)
    with pytest.raises(AdapterError, match=message):
        getattr(model, method)()
    after = _buffers(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = [module for module in model.modules() if isinstance(module, QALoRALinear)]
    assert len(layers) == 14 and not any(layer.merged for layer in layers)


def test_a_diverged_adapter_does_not_keep_others_from_being_merged(make_peft):
    model = make_peft()
    model.add_adapter("other", QALoRAConfig(r=2))
    _last_layer(model).qalora_A["other"].weight.data[0, 0] = float("nan")
    model.merge_adapter(["default"])
    assert _last_layer(model).merged_adapters == ["default"]


@torch.no_grad()
def test_merged_adapter_cannot_be_deleted(make_peft, fill_adapters, ids):
    model = make_peft()
    model.add_adapter("other", QALoRAConfig(r=2))
    fill_adapters(model)
    model.merge_adapter(["default"])
    logits = model(ids).logits
    with pytest.raises(AdapterError, match=r"'default' is merged .*unmerge_adapter"):
        model.delete_adapter("default")
    assert sorted(model.peft_config) == ["default", "other"]
    model.delete_adapter("other")
    assert torch.equal(model(ids).logits, logits)
    model.unmerge_adapter()
    model.delete_adapter("default")


def test_unmerge_restores_the_bits_after_a_change_of_dtype(make_peft):
    model = make_peft(adapt="both")
    before = _buffers(model)
    model.merge_adapter()
    assert any(not torch.equal(before[n], b) for n, b in _buffers(model).items())
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    after = _buffers(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_merged_config_says_what_was_merged(make_llama, make_peft):
    model = make_llama()
    model.config.quantization_config = QALoRAQuantConfig(bits=4, group_size=16)
    model = make_peft(model, lora_alpha=3)
    model.add_adapter("other", QALoRAConfig(r=2))
    merged = model.merge_and_unload()
    first = merged.config.quantization_config.merged
    assert first["adapter"] == "default"
    assert (first["r"], first["lora_alpha"], first["convention"]) == (4, 3, "sum")
    # a merged model can be trained on; its adapters know that
    again = get_peft_model(merged, QALoRAConfig(r=2))
    assert again.peft_config["default"].base_merged == first
    second = again.merge_and_unload().config.quantization_config.merged
    assert second["before"] == first


@torch.no_grad()
@pytest.mark.parametrize("unmerge", [False, True])
def test_unload_keeps_what_is_merged_and_says_so(make_llama, make_peft, ids, unmerge):
    model = make_llama()
    model.config.quantization_config = QALoRAQuantConfig(bits=4, group_size=16)
    base = model(ids).logits
    model = make_peft(model)
    model.merge_adapter()
    merged = model(ids).logits
    assert not torch.equal(merged, base)
    if unmerge:
        model.unmerge_adapter()
    config = model.peft_config["default"]
    plain = model.unload()
    assert torch.equal(plain(ids).logits, base if unmerge else merged)
    record = plain.config.quantization_config.merged
    assert record is None if unmerge else record["adapter"] == "default"
    if unmerge:
        get_peft_model(plain, config)
    else:  # the same adapter would be applied twice
        with pytest.raises(AdapterError, match=r"base_merged=None, found .*={'adapter': 'default'"):
            get_peft_model(plain, config)


@torch.no_grad()
def test_merge_and_unload_of_chosen_adapters(make_llama, make_peft, ids, fill_adapters):
    model = make_llama()
    model.config.quantization_config = QALoRAQuantConfig(bits=4, group_size=16)
    model = make_peft(model)
    model.add_adapter("other", QALoRAConfig(r=2, adapt="scales"))
    fill_adapters(model)
    model.base_model.set_adapter(["default", "other"])
    logits = model(ids).logits
    merged = model.merge_and_unload(adapter_names=["default", "other"])
    assert torch.equal(merged(ids).logits, logits)
    record = merged.config.quantization_config.merged
    assert record["adapter"] == "default, other"
    assert [entry["adapt"] for entry in record["adapters"]] == ["zeros", "scales"]


@torch.no_grad()
def test_whole_modules_are_those_of_the_merged_adapters(make_llama, make_peft, ids, fill_adapters):
    """Whichever adapter is active; `unload` merges none."""

    def make(second=None, active="default"):
        model = make_peft(modules_to_save=["lm_head"])
        model.add_adapter("other", QALoRAConfig(r=2, modules_to_save=second))
        fill_adapters(model)
        for name, weight in model.named_parameters():
            if ".modules_to_save." in name:
                weight.mul_(2 if ".default." in name else 3)
        model.set_adapter("other")
        logits = model(ids).logits
        model.set_adapter(active)
        return model, logits

    for model, logits in (make(), make(["lm_head"]), make(["norm"], "other")):
        assert torch.equal(model.merge_and_unload(adapter_names=["other"])(ids).logits, logits)
    model, _ = make(["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head: the adapters \['default', 'other'\] each"):
        model.merge_and_unload(adapter_names=["default", "other"])
    assert torch.equal(model.unload()(ids).logits, make_llama()(ids).logits)
