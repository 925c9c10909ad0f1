"""QALoRAQuantConfig as config.json has it, and its `merged` entry."""

import copy
import inspect
import json
from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.merged import MergedAdapter, merged_from_files, merged_in_memory
from qalora_plugin.errors import ConfigError

WRITTEN = {
    "quant_method": "qalora",
    "format_version": 1,
    "bits": 3,
    "group_size": 64,
    "desc_act": False,
    "offsets_dtype": "float16",
    "modules_to_not_convert": ["lm_head"],
    "dynamic": {"down_proj": {"bits": 8}},
    "method": "rtn",
    "base": {},
    "merged": None,
}


def test_is_written_and_read_as_transformers_does():
    given: dict[str, Any] = {"modules_to_not_convert": ("lm_head",), "dynamic": WRITTEN["dynamic"]}
    config = QALoRAQuantConfig(3, 64, **given)
    assert config.to_dict() == WRITTEN  # releases that know no offsets_at read it too
    assert json.loads(config.to_json_string()) == WRITTEN
    assert "offsets_at" in QALoRAQuantConfig(offsets_at="minimum").to_dict()
    for read in (AutoQuantizationConfig.from_dict(WRITTEN), copy.deepcopy(config)):
        assert isinstance(read, QALoRAQuantConfig) and read == config != QALoRAQuantConfig()
    found, unused = QALoRAQuantConfig.from_dict(WRITTEN, True, bits=2, other=1)
    assert (found.bits, unused) == (2, {"other": 1})
    assert config.update(bits=8, other=1) == {"other": 1} and config.get("bits") == 8
    assert config.get("dequantize", "none") == "none"
    assert list(inspect.signature(QALoRAQuantConfig).parameters)[:2] == ["bits", "group_size"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4, "sym": True}, r"unknown keys \['sym'\]; known are .*'quant_method'"),
        ({"format_version": 2}, "format_version 2 is not the one.*update qalora-plugin"),
        ({"bits": True}, "bits must be one of"),
        ({"group_size": 0}, "group_size must be a positive integer, or -1"),
        ({"offsets_dtype": "bfloat16"}, "offsets_dtype must be one of"),
        ({"offsets_at": "minimum", "offsets_dtype": "float32"}, "leave offsets_dtype out"),
        ({"dynamic": {"a": {"sym": 1}}}, r"dynamic\['a'\] has unknown keys \['sym'\]"),
        ({"dynamic": {"a": 4}}, r"dynamic\['a'\] must be an object, found 4"),
        ({"dynamic": {"a": {"bits": 5}}}, r"dynamic\['a'\]: bits must be one of"),
    ],
)
def test_what_it_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        QALoRAQuantConfig(**values)


def test_merged_of_both_doors():
    """The keys that earlier releases wrote, in memory and from files."""
    settings = {"peft_type": "QALORA", "convention": "sum", "adapt": "zeros", "r": 4}
    settings |= {"lora_alpha": 8, "modules_to_save": []}
    one, two = (MergedAdapter(adapter=name, **settings) for name in ("a", "b"))
    first = merged_in_memory([one], None)
    assert first == {"adapter": "a"} | settings
    assert merged_in_memory([one, two], first) == {
        "adapter": "a, b",
        "peft_type": "QALORA",
        "adapters": [{"adapter": "a"} | settings, {"adapter": "b"} | settings],
        "before": first,
    }
    stored = MergedAdapter(adapter="a", adapter_sha256="ab", layers=14, **settings)
    known = {"adapter": "a", "adapter_sha256": "ab", "layers": 14, "base_merged": None}
    assert merged_from_files(stored, None) == known | settings
