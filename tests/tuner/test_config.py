"""QALoRAConfig: what it takes, what it refuses, how it is stored."""

import dataclasses
import json

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from safetensors.torch import save_file

from qalora_plugin import QALoRAConfig
from qalora_plugin.errors import AdapterError, ConfigError
from qalora_plugin.tuner.scaling import check_scaling

OURS = {field.name for field in dataclasses.fields(QALoRAConfig)}
LORA_ONLY = [field for field in dataclasses.fields(LoraConfig) if field.name not in OURS]


def test_keeps_loras_fields_and_defaults():
    lora, ours = LoraConfig(), QALoRAConfig()
    shared = {field.name for field in dataclasses.fields(LoraConfig)} & OURS
    assert shared >= {
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
        "rank_pattern", "alpha_pattern", "use_rslora", "bias", "layers_to_transform",
        "layers_pattern", "init_lora_weights",
    }  # fmt: skip
    for name in shared - {"peft_type"}:
        assert getattr(ours, name) == getattr(lora, name), name


@pytest.mark.parametrize("field", LORA_ONLY, ids=lambda field: field.name)
def test_refuses_what_only_lora_has_by_name(field):
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    QALoRAConfig(**{field.name: default})
    QALoRAConfig(**{field.name: None})
    with pytest.raises(ConfigError, match=field.name):
        QALoRAConfig(**{field.name: {"something": "else"}})


def test_refusal_says_what_to_do():
    QALoRAConfig(use_dora=False)
    with pytest.raises(ConfigError, match=r"use_dora=True .*DoRA.* Leave use_dora out"):
        QALoRAConfig(use_dora=True)
    with pytest.raises(TypeError, match="rnak"):
        QALoRAConfig(rnak=8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"r": 0}, "r must be a positive integer, found 0"),
        ({"r": 8.0}, "r must be a positive integer, found 8.0"),
        ({"r": True}, "r must be"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": "16"}}, "alpha_pattern"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_dropout": 0.1, "adapt": "scales"}, "lora_dropout=0.1 needs adapt="),
        ({"lora_dropout": 0.1, "adapt": "both"}, "lora_dropout=0.1 needs adapt="),
        ({"adapt": "zero"}, "adapt must be one of"),
        ({"convention": "mean"}, "convention"),
        ({"bias": "all"}, 'bias must be "none" .*modules_to_not_convert'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"seed": -1}, "seed"),
        ({"bits": 5}, "bits"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ".*_proj", "layers_to_transform": 0}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        (
            {"modules_to_save": "lm_head"},
            "modules_to_save must be a list of names, found 'lm_head'",
        ),
        ({"target_modules": [3]}, "target_modules must be a name"),
        ({"exclude_modules": 5}, "exclude_modules must be a name"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must be a dictionary"),
        ({"use_rslora": "no"}, "use_rslora must be True or False, found 'no'"),
        ({"adapt": ["zeros"]}, "adapt must be one of"),
        ({"write_back": 0}, "write_back must be True, False or None, found 0"),
    ],
)
def test_refuses_values_out_of_range(settings, named):
    with pytest.raises(ConfigError, match=named):
        QALoRAConfig(**settings)


def test_a_range_of_layers_can_be_saved(tmp_path):
    config = QALoRAConfig(layers_to_transform=range(2), modules_to_save=("lm_head",))
    config.save_pretrained(tmp_path)
    assert QALoRAConfig.from_pretrained(str(tmp_path)) == config


def test_stored_as_plain_json_and_read_back(tmp_path):
    config = QALoRAConfig(
        r=16,
        target_modules=["v_proj", "q_proj", "o_proj"],
        rank_pattern={"q_proj": 4},
        adapt="both",
        bits=3,
        group_size=-1,
        fingerprint="ab",
        base_merged={"adapter": "x"},
        base_refined={"steps": 3},
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "QALORA"
    assert stored["target_modules"] == ["o_proj", "q_proj", "v_proj"]
    for reader in (PeftConfig, QALoRAConfig):
        assert reader.from_pretrained(str(tmp_path)) == config


def test_pickled_adapter_is_refused(tmp_path):
    QALoRAConfig().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin.*safetensors"):
        QALoRAConfig.from_pretrained(str(tmp_path))
    save_file({}, tmp_path / "adapter_model.safetensors")
    QALoRAConfig.from_pretrained(str(tmp_path))


def test_token_indices_are_refused_however_they_come():
    config = QALoRAConfig()
    assert config.trainable_token_indices is None  # TRL asks
    with pytest.raises(ConfigError, match="modules_to_save"):
        config.trainable_token_indices = {"embed_tokens": [1]}


def test_rank_and_scaling_follow_patterns():
    config = QALoRAConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"layers\.1\.mlp\..*": 2},
        alpha_pattern={"q_proj": 1},
    )
    assert config.rank_and_scaling("model.layers.0.self_attn.k_proj") == (8, 2.0)
    assert config.rank_and_scaling("model.layers.0.self_attn.q_proj") == (4, 0.25)
    assert config.rank_and_scaling("model.layers.1.mlp.up_proj") == (2, 8.0)
    assert QALoRAConfig(r=16, lora_alpha=8, use_rslora=True).rank_and_scaling("x") == (16, 2.0)


def test_scaling_is_checked_for_others_too():
    """A merge reads the fields from a file, and raises its own error."""
    settings = {"r": 4, "lora_alpha": 8, "rank_pattern": None, "target_modules": "x"}
    check_scaling(settings, "there", AdapterError)
    for wrong in ({"r": None}, {"alpha_pattern": {"q_proj": 0}}):
        with pytest.raises(AdapterError, match=r"there: \S+ must be a positive .*, found (None|0)"):
            check_scaling(settings | wrong, "there", AdapterError)


def test_peft_type():
    assert QALoRAConfig().peft_type is PeftType.QALORA
