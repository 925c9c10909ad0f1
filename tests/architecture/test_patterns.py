"""Expressions from files end in time, and mean what `re` and PEFT mean by them."""

import re
import time
from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from qalora_plugin.architecture.patterns import match_inside, match_start, match_whole
from qalora_plugin.errors import ConfigError
from qalora_plugin.tuner.scaling import rank_and_scaling
from qalora_plugin.tuner.selecting import SELECTING_FIELDS, is_selected, pattern_key

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.11.mlp.experts.0.up_proj",
    "lm_head",
    "score",
]
CATASTROPHIC = ["(a+)+$", "(a|aa)+$", "(a|a)*$", "(.*)*b", r"(\w+\s?)*!", ".*.*.*.*.*.*.*.*.*b"]
LONG = "a" * 3000
SLOW, NAME = "(a|aa)+c", "a" * 200 + "bc"


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_a_catastrophic_pattern_ends_in_time(pattern):
    started = time.process_time()
    for run in (match_start, match_whole, match_inside):
        try:
            run(pattern, LONG + "!x")
        except ConfigError as error:
            assert "takes more than" in str(error)
    assert time.process_time() - started < 8


def test_one_that_needs_for_ever_is_an_error_with_its_name():
    with pytest.raises(ConfigError, match=r"the pattern '\(a\|aa\)\+c' takes more than 1 s"):
        match_whole(SLOW, NAME)
    with pytest.raises(ConfigError, match="takes more than"):
        rank_and_scaling(NAME, r=4, lora_alpha=8, rank_pattern={SLOW: 8})
    with pytest.raises(ConfigError, match="takes more than"):
        is_selected({"target_modules": SLOW}, NAME)
    with pytest.raises(ConfigError, match="takes more than"):
        is_selected({"target_modules": ["a"], "exclude_modules": SLOW}, NAME)
    with pytest.raises(ConfigError, match="takes more than"):
        is_selected({"target_modules": ["a"], "modules_to_save": [SLOW]}, NAME)


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{2,1}", "(?P<1>a)", "x" * 10_001])
def test_what_is_no_pattern(pattern):
    with pytest.raises(ConfigError, match=r"is not a regular expression|expected at most"):
        match_whole(pattern, "a")


CONFIGS = [
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": ["model.layers.1.mlp.down_proj"]},
    {"target_modules": r".*\.(q|up)_proj"},
    {"target_modules": r".*_proj", "exclude_modules": r".*mlp.*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    {"target_modules": ["q_proj", "up_proj", "down_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["up_proj"], "layers_to_transform": 11, "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": ["experts", "h"]},
    {"target_modules": ["lm_head", "score", "q_proj"], "modules_to_save": ["score"]},
    {"target_modules": r"lm_head|.*", "modules_to_save": ["self_attn"]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_selecting_is_pefts_rule(config):
    theirs = SimpleNamespace(**{**dict.fromkeys(SELECTING_FIELDS), **config})
    for name in NAMES:
        assert is_selected(config, name) == bool(check_target_module_exists(theirs, name)), name


def test_a_layers_pattern_is_a_name():
    config = {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "(a+)+"}
    with pytest.raises(ConfigError, match="layers_pattern: expected the name of a module"):
        is_selected(config, NAMES[0])


@pytest.mark.parametrize("key", ["q_proj", r"layers\.1.*", "lm_head", "(down|up)_proj", "proj"])
def test_pattern_keys_are_pefts(key):
    for name in NAMES:
        assert pattern_key({key: 1}, name) == get_pattern_key([key], name)
        assert match_start(key, name) == bool(re.match(key, name))
        assert match_inside(key, name) == bool(re.search(key, name))
