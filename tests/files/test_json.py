"""Hostile JSON ends in one error that names the file, and where there is one the key."""

import json
import time

import pytest

from qalora_plugin.checkpoint.kind import find_kind
from qalora_plugin.errors import CheckpointError
from qalora_plugin.files.json import read_json
from qalora_plugin.files.safetensors import read_header
from qalora_plugin.files.schemas import (
    AdapterConfig,
    ConfigFile,
    Index,
    Manifest,
    QuantizationConfig,
    Record,
    read_as,
)

HOSTILE = {
    "empty": b"",
    "not text": b"\xff\xfe{",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "an endless number": b'{"bits": 1' + b"0" * 400 + b"}",
    "a number that Python refuses": b'{"bits": 1' + b"0" * 5000 + b"}",
    "nested lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "half a character": b'{"a": "\\ud800"}',
    "half a character in a key": b'{"\\udfff": 1}',
    "half a character in a list": b'{"a": [["\\ud800"]]}',
    "a key twice": b'{"bits": 4, "bits": 3}',
    "a key twice, below": b'{"a": {"bits": 4, "bits": 3}}',
    "cut short": b'{"bits": 4',
    "trailing": b'{"bits": 4} {}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_one_error_that_names_the_file(case, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError) as caught:
        read_json(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    str(caught.value).encode()  # can be printed
    with pytest.raises(CheckpointError):
        find_kind(tmp_path)


def test_what_transformers_writes_is_read(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": int(1e30), "limit": float("inf")}))
    assert read_json(path)["model_max_length"] == int(1e30)
    path.write_text('{"a": "\\ud83d\\ude00"}')  # two halves of one character
    assert read_json(path) == {"a": "\U0001f600"}


WRONG_TYPES = [
    (ConfigFile, {"quantization_config": [1]}, "quantization_config"),
    (
        ConfigFile,
        {"quantization_config": {"quant_method": ["gptq"]}},
        "quantization_config.quant_method",
    ),
    (ConfigFile, {"architectures": "LlamaForCausalLM"}, "architectures"),
    (ConfigFile, {"vocab_size": "64"}, "vocab_size"),
    (ConfigFile, {"vocab_size": 10**20}, "vocab_size"),
    (ConfigFile, {"text_config": 3}, "text_config"),
    (QuantizationConfig, {"dynamic": {"a": 4}}, "dynamic.a"),
    (QuantizationConfig, {"merged": {"adapters": [1]}}, "merged.adapters.0"),
    (QuantizationConfig, {"base": "name"}, "base"),
    (QuantizationConfig, {"base": {"fingerprint": 3}}, "base.fingerprint"),
    (AdapterConfig, {"r": True}, "r"),
    (AdapterConfig, {"r": "8"}, "r"),
    (AdapterConfig, {"r": 10**30}, "r"),
    (AdapterConfig, {"rank_pattern": {"q": "4"}}, "rank_pattern.q"),
    (AdapterConfig, {"alpha_pattern": ["q"]}, "alpha_pattern"),
    (AdapterConfig, {"target_modules": {"a": 1}}, "target_modules"),
    (AdapterConfig, {"modules_to_save": [3]}, "modules_to_save.0"),
    (AdapterConfig, {"base_merged": "x"}, "base_merged"),
    (AdapterConfig, {"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
    (Index, {"weight_map": {"a": ["x"]}}, "weight_map.a"),
    (Index, {"metadata": {}}, "weight_map"),
    (Manifest, {"version": "2", "files": {}}, "version"),
    (Manifest, {"version": 2, "files": []}, "files"),
    (Record, {"format": 3}, "format"),
    (Record, {"source": []}, "source"),
    (Record, {"source": {"bits": "4"}}, "source.bits"),
    (Record, {"measured": {"exact": "1"}}, "measured.exact"),
]


@pytest.mark.parametrize(("schema", "value", "key"), WRONG_TYPES)
def test_a_value_of_another_type_is_named(schema, value, key, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=f"^{path}: {key}: "):
        read_as(path, schema)


def test_duplicate_names_in_a_header_take_linear_time(tmp_path):
    entry = '"a%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = [entry % (index % 150_000) for index in range(150_001)]
    header = ("{" + ",".join(names) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="'a0' appears twice"):
        read_header(path)
    assert time.process_time() - started < 5
