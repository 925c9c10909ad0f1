"""QALORA as a member of PEFT's enum and tables."""

import copy
import json
import pickle

import pytest
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.peft_types import PeftType

from qalora_plugin.errors import ConfigError
from qalora_plugin.tuner import QALoRAConfig, QALoRAModel
from qalora_plugin.tuner.register import register


def test_member_behaves_as_one_that_was_always_there():
    member = PeftType.QALORA
    assert isinstance(member, PeftType)
    assert PeftType("QALORA") is PeftType["QALORA"] is member
    assert member.name == member.value == member == "QALORA"
    assert list(PeftType).count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps(member) == '"QALORA"'
    assert PeftType.LORA is PeftType("LORA")


def test_registering_twice_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert (list(PeftType), PEFT_TYPE_TO_CONFIG_MAPPING) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.QALORA] is QALoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.QALORA] is QALoRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.QALORA] == "qalora_"


def test_another_method_of_that_name_is_an_error(monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.QALORA, Other)
    with pytest.raises(ConfigError, match="Other"):
        register()
