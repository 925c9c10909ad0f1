"""The `qalora:` block and the keys that contradict it. Axolotl itself is not imported."""

import importlib
import sys
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

import qalora_plugin.axolotl
from qalora_plugin.axolotl import QALoRAArgs, QALoRABlock
from qalora_plugin.axolotl.checks import check_best_is_kept, check_config
from qalora_plugin.checkpoint.format import exports
from qalora_plugin.errors import ConfigError


def test_defaults_are_the_papers_mode():
    block = QALoRAArgs().qalora
    assert (block.bits, block.group_size, block.adapt) == (4, 32, "zeros")
    assert block.merge_on_finish


def test_an_unknown_key_is_named_with_what_is_allowed():
    with pytest.raises(ValidationError, match=r"unknown key bitz; allowed are adapt, bits, "):
        QALoRABlock.model_validate({"bitz": 4})


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"adapt": "all"},
        {"calibration_samples": 0},
        {"merge_formats": ["mlx"], "merge_on_finish": False},
    ],
)
def test_a_wrong_value_is_named(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        QALoRABlock.model_validate(wrong)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"group_size": -2}, "qalora: group_size must be a positive integer"),
        ({"group_size": 0}, "qalora: group_size must be a positive integer"),
        ({"desc_act": True, "quantize_method": "rtn"}, "desc_act does not go with quantize_method"),
        (
            {"calibration": "text.txt", "quantize_method": "rtn"},
            "calibration does not go with quantize_method: rtn, .* or use quantize_method: gptq",
        ),
        (
            {"offsets_at": "minimum", "zero_points": "integer"},
            "offsets_at: minimum needs real-valued offsets: with zero_points: integer",
        ),
        ({"bits": "auto"}, "bits: auto and target_bits go together"),
        ({"target_bits": 3.0}, "bits: auto and target_bits go together"),
        (
            {"refine": True, "quantize_method": "rtn"},
            "refine does not go with quantize_method: rtn",
        ),
        ({"refine": True, "refine_rate": 2.0}, "refine_rate must lie between 0 and 1"),
        ({"refine_steps": 9}, "refine_steps is a setting of refine: give both, or leave it out"),
    ],
)
def test_what_quantizing_refuses_is_said_in_keys(block, message):
    with pytest.raises(ValidationError, match=message):
        QALoRABlock.model_validate(block)


@pytest.mark.parametrize(
    ("format", "adapt", "advice"),
    [("gptq", "zeros", "scales"), ("gptq", "both", "scales"), ("lora", "both", "zeros")],
)
def test_formats_that_cannot_hold_what_is_trained(format, adapt, advice):
    with pytest.raises(ValidationError, match=rf"{format} does not go with.*Set adapt: {advice}"):
        QALoRABlock.model_validate({"merge_formats": ["qalora", format], "adapt": adapt})
    QALoRABlock.model_validate({"merge_formats": ["qalora", format], "adapt": advice})


@pytest.mark.parametrize("format", ["qalora", *(format.name for format in exports())])
def test_merge_formats_are_what_can_be_exported(format):
    adapt = "scales" if format in ("gptq", "compressed-tensors") else "zeros"
    assert QALoRABlock(merge_formats=[format], adapt=adapt).merge_formats == [format]
    with pytest.raises(ValidationError, match=f"merge_formats: expected some of.* {format}.*'hqq'"):
        QALoRABlock(merge_formats=["hqq"])


def test_every_key_has_a_help_text():
    for name, field in QALoRABlock.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("load_in_4bit", True),
        ("load_in_8bit", True),
        ("peft_use_dora", True),
        ("lora_mlp_kernel", True),
        ("relora", True),
        ("peft", {"loftq_config": {"loftq_bits": 4}}),
        ("peft_init_lora_weights", "pissa"),
        ("fsdp_config", {"offload_params": False}),
        ("lm_eval_tasks", ["arc_easy"]),
        ("peft_autocast_adapter_dtype", False),
        ("unfrozen_parameters", ["norm"]),
        ("lisa_n_layers", 2),
        ("fix_untrained_tokens", True),
    ],
)
def test_a_contradicting_key_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=key.removesuffix("_config").removesuffix("_tasks")):
        check_config({"adapter": "qalora", key: value})


def test_the_best_adapter_is_not_dropped():
    kept, dropped = (SimpleNamespace(load_best_model_at_end=best) for best in (True, False))
    check_best_is_kept({"load_best_model_at_end": True}, kept)
    check_best_is_kept({"load_best_model_at_end": False}, dropped)
    with pytest.raises(ConfigError, match=r"load_best_model_at_end: Axolotl has dropped it"):
        check_best_is_kept({"load_best_model_at_end": True}, dropped)


def test_switched_off_keys_are_no_contradiction():
    off = ("load_in_4bit", "load_in_8bit", "lora_mlp_kernel", "peft_use_dora", "relora")
    check_config({"adapter": "qalora", **dict.fromkeys(off, False)})
    check_config({"adapter": "qalora", "lm_eval_tasks": ["x"], "lm_eval_post_train": False})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "set fsdp_version: 2"),
        ({"fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "{state_dict_type: SHARDED_"),
        ({"fsdp_config": {"reshard_after_forward": True}}, "{state_dict_type: SHARDED_"),
        (
            {
                "fsdp_config": {
                    "state_dict_type": "SHARDED_STATE_DICT",
                    "fsdp_cpu_ram_efficient_loading": True,
                }
            },
            "{cpu_ram_efficient_loading: false}",
        ),
        ({"rl": "dpo"}, "lora_modules_to_save or rl"),
        ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save or rl"),
    ],
)
def test_fsdp_is_the_second_one(changes, message):
    cfg = {"adapter": "qalora", "fsdp_version": 2}
    cfg |= {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    check_config(cfg)
    inside = {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    check_config({"adapter": "qalora", "fsdp_config": inside})
    with pytest.raises(ConfigError, match=message):
        check_config(cfg | changes)


def test_the_block_needs_the_adapter():
    with pytest.raises(ConfigError, match="adapter: qalora"):
        check_config({"adapter": "lora", "qalora": {"bits": 4}})
    check_config({"adapter": "lora", "load_in_8bit": True})


def test_dpo_cannot_start_from_an_adapter_but_can_be_merged():
    cfg = {"adapter": "qalora", "rl": "dpo", "lora_model_dir": "out"}
    with pytest.raises(ConfigError, match="lora_model_dir"):
        check_config(cfg)
    check_config(cfg | {"merge_lora": True})


def test_the_settings_are_importable_without_axolotl(monkeypatch):
    name = "qalora_plugin.axolotl"
    monkeypatch.setattr(qalora_plugin, "axolotl", qalora_plugin.axolotl)  # put back afterwards
    for loaded in [module for module in sys.modules if module.startswith(name)]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, "axolotl", None)
    module = importlib.import_module(name)
    for part in ("base", "finish", "checks"):
        importlib.import_module(f"{name}.{part}")
    with pytest.raises(ImportError, match="axolotl"):
        _ = module.QALoRAPlugin
