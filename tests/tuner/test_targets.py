"""Which layers get an adapter, and what is refused."""

import pytest
from peft import get_peft_model
from support.models import llama
from torch import nn

from qalora_plugin import QALoRAConfig
from qalora_plugin.errors import ConfigError
from qalora_plugin.tuner import QALoRALinear

PER_BLOCK = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def _adapted(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, QALoRALinear)
    }


def _leaves(model):
    return {name.rpartition(".")[2] for name in _adapted(model)}


@pytest.mark.parametrize(
    ("settings", "count", "leaves"),
    [
        ({}, 14, set(PER_BLOCK)),
        ({"target_modules": "all-linear"}, 14, set(PER_BLOCK)),
        ({"exclude_modules": ["q_proj", "up_proj"]}, 10, set(PER_BLOCK) - {"q_proj", "up_proj"}),
        ({"exclude_modules": r".*\.mlp\..*"}, 8, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"layers_to_transform": [1]}, 7, set(PER_BLOCK)),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, 7, set(PER_BLOCK)),
        ({"target_modules": ["q_proj", "v_proj"]}, 4, {"q_proj", "v_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, 1, {"q_proj"}),
        ({"target_modules": r".*\.self_attn\.[qk]_proj"}, 4, {"q_proj", "k_proj"}),
        ({"target_modules": ["q_proj", "no_such_layer"]}, 2, {"q_proj"}),
    ],
)
def test_targets(make_llama, settings, count, leaves):
    model = get_peft_model(make_llama(), QALoRAConfig(r=2, **settings))
    assert len(_adapted(model)) == count
    assert _leaves(model) == leaves


def test_all_linear_is_written_out_even_when_peft_shortens_the_names(make_llama):
    """From 20 names on PEFT looks for suffixes; layers_to_transform still has to hold."""
    model = make_llama()
    while len(model.model.layers) < 4:
        model.model.layers.append(make_llama().model.layers[0])
    config = QALoRAConfig(r=2, layers_to_transform=[0, 2, 3], exclude_modules=["k_proj"])
    adapted = get_peft_model(model, config)
    assert len(_adapted(adapted)) == 18
    stored = adapted.peft_config["default"]
    again = get_peft_model(adapted.unload(), stored)
    assert len(_adapted(again)) == 18
    assert config.target_modules is None  # the caller's object is left as it was


def test_ranks_and_scalings_follow_patterns(make_llama):
    config = QALoRAConfig(
        r=8, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 4}
    )
    model = get_peft_model(make_llama(), config).base_model.model.model
    q, v = (getattr(model.layers[1].self_attn, name) for name in ("q_proj", "v_proj"))
    assert q.qalora_A["default"].weight.shape == (2, 4)
    assert (q.scaling["default"], v.scaling["default"]) == (4.0, 0.5)
    assert model.layers[0].self_attn.v_proj.scaling["default"] == 1.0


def test_only_adapters_train(make_llama):
    model = get_peft_model(make_llama(), QALoRAConfig(r=2))
    assert all(
        ("qalora_" in name) == parameter.requires_grad
        for name, parameter in model.named_parameters()
    )


def test_base_that_is_not_quantized_is_refused_with_both_ways():
    plain = llama(num_hidden_layers=1)
    with pytest.raises(
        ConfigError, match=r"quantization_config=QALoRAQuantConfig.*qalora quantize"
    ):
        get_peft_model(plain, QALoRAConfig())
    with pytest.raises(ConfigError, match="bits=3, group_size=64"):
        get_peft_model(plain, QALoRAConfig(bits=3, group_size=64))
    assert all(type(m) is not QALoRALinear for m in plain.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["query"]}, r"\['query'\]|\{'query'\}.*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "layers_to_transform"),
        ({"exclude_modules": list(PER_BLOCK)}, "exclude_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"lm_head \(Linear\).*modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens \(Embedding\)"),
        ({"target_modules": ["self_attn"]}, r"self_attn \(LlamaAttention\)"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save names 'q_proj', which is quantized"),
    ],
)
def test_targets_that_cannot_be_adapted(make_llama, settings, message):
    model = make_llama()
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, QALoRAConfig(**settings))
    assert not any(isinstance(m, QALoRALinear) for m in model.modules())


def test_mixed_base_names_the_unquantized_layer(make_llama):
    model = make_llama()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 172, bias=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj \(Linear\)"):
        get_peft_model(model, QALoRAConfig(target_modules=["up_proj"]))
    adapted = get_peft_model(model, QALoRAConfig())
    assert "model.layers.1.mlp.up_proj" not in _adapted(adapted)


def test_one_config_serves_two_bases(make_llama):
    config = QALoRAConfig(r=2)
    four = get_peft_model(make_llama(bits=4), config).peft_config["default"]
    two = get_peft_model(make_llama(bits=2), config).peft_config["default"]
    assert (four.bits, two.bits) == (4, 2)
    assert four.fingerprint != two.fingerprint


def test_an_adapter_around_another_is_refused(make_llama):
    """Its tensors would be named after both, and nothing could load or merge them."""
    model = get_peft_model(make_llama(), QALoRAConfig(r=2))
    with pytest.raises(ConfigError, match=r"a PeftModel already.*model\.unload\(\)"):
        get_peft_model(model, QALoRAConfig(r=2))
    get_peft_model(model.unload(), QALoRAConfig(r=2))


def test_a_misspelt_target_is_told_of(make_llama, caplog):
    get_peft_model(
        make_llama(), QALoRAConfig(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    )
    assert "target_modules" not in caplog.text
    get_peft_model(make_llama(), QALoRAConfig(r=2, target_modules=["q_proj", "k_porj"]))
    assert "target_modules: k_porj: nothing in the base is selected by it" in caplog.text


@pytest.mark.parametrize(
    ("field", "right", "wrong"),
    [
        ("modules_to_save", ["lm_head"], ["lm_haed"]),
        ("exclude_modules", ["q_proj", "layers.1.mlp"], ["q_porj"]),
        ("layers_to_transform", [0, 1], [7]),
    ],
)
def test_what_selects_nothing_is_told_of(field, right, wrong, make_llama, caplog):
    get_peft_model(make_llama(), QALoRAConfig(r=2, **{field: right}))
    assert not caplog.records
    get_peft_model(make_llama(), QALoRAConfig(r=2, **{field: [*right, *wrong]}))
    assert f"{field}: {wrong[0]}: nothing in the base is selected by it" in caplog.text


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_adapted_layer_matches_is_told_of(field, make_llama, caplog):
    config = QALoRAConfig(r=2, target_modules=["q_proj"], **{field: {"q_proj": 4}})
    get_peft_model(make_llama(), config)
    assert field not in caplog.text
    config = QALoRAConfig(r=2, target_modules=["q_proj"], **{field: {"q_proj": 4, "k_proj": 8}})
    get_peft_model(make_llama(), config)
    assert f"{field}: k_proj: nothing in the base is selected by it" in caplog.text
