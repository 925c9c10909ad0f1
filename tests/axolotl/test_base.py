"""The base of a run: recognised, quantized once, and found again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.models import llama

from qalora_plugin.axolotl import QALoRABlock
from qalora_plugin.axolotl.base import (
    calibration_from_rows,
    check_base,
    is_quantized,
    quantized_base,
)
from qalora_plugin.errors import CheckpointError, ConfigError, QuantizationError

STOCK = Path(__file__).parent.parent / "fixtures" / "gptq_4bit_g128_actorder_asym"


def tokenize(text):
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "dense"
    llama(hidden_size=32, intermediate_size=64, num_hidden_layers=1).save_pretrained(directory)
    return directory


def cfg(dense, tmp_path, **block):
    settings = QALoRABlock(**{"quantize_method": "rtn", **block}).model_dump()
    return SimpleNamespace(
        base_model=str(dense),
        revision_of_model=None,
        seed=1,
        sequence_len=16,
        output_dir=str(tmp_path / "out"),
        qalora=settings,
    )


def test_kinds_of_bases(dense, tmp_path):
    assert not is_quantized(str(dense))
    assert is_quantized(str(STOCK))
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    weights = (dense / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="hqq"):
        is_quantized(str(tmp_path))


def test_an_unreadable_base_is_named(dense, tmp_path):
    check_base(str(dense))
    check_base("org/name")  # a Hub id: not looked at, which would need the network
    with pytest.raises(CheckpointError, match="base_model"):
        check_base("./no/such/model")
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="base_model"):
        check_base(str(tmp_path))


def test_calibration_windows_from_tokenized_rows():
    rows = [{"input_ids": [row] * 5} for row in range(20)]
    windows = calibration_from_rows(rows, 4, 10, seed=3, tokenize=tokenize)
    assert windows.shape == (4, 10)
    assert windows.dtype == torch.int64
    again = calibration_from_rows(rows, 4, 10, seed=3, tokenize=tokenize)
    assert torch.equal(windows, again)
    other = calibration_from_rows(rows, 4, 10, seed=4, tokenize=tokenize)
    assert not torch.equal(windows, other)


def test_a_small_set_gives_fewer_windows():
    windows = calibration_from_rows([{"input_ids": [1, 2, 3]}], 8, 16, seed=0, tokenize=tokenize)
    assert windows.shape == (1, 3)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "chosen": "cd", "rejected": "zz"},
        {"prompt": "ab", "completion": "cd", "label": True},
        {"prompt": "abcd"},
    ],
)
def test_calibration_from_texts(row):
    windows = calibration_from_rows([row], 1, 4, seed=0, tokenize=tokenize)
    assert windows.tolist() == [tokenize("abcd")]


@pytest.mark.parametrize("rows", [iter([]), [], [{"labels": [1, 2]}]])
def test_rows_without_tokens_are_refused(rows):
    with pytest.raises(QuantizationError, match="calibration: FILE"):
        calibration_from_rows(rows, 1, 4, seed=0, tokenize=tokenize)


def test_a_base_is_quantized_once(dense, tmp_path):
    first = quantized_base(cfg(dense, tmp_path), [], tokenize)
    written = (first / "config.json").stat().st_mtime_ns
    assert first.parent == tmp_path / "quantized_bases"
    assert quantized_base(cfg(dense, tmp_path), [], tokenize) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert quantized_base(cfg(dense, tmp_path, bits=3), [], tokenize) != first
    chosen = cfg(dense, tmp_path, quantized_model_dir=str(tmp_path / "mine"))
    assert quantized_base(chosen, [], tokenize) == tmp_path / "mine" / first.name


def test_windows_are_no_longer_than_the_base_takes(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    llama(**sizes, max_position_embeddings=16).save_pretrained(tmp_path / "short")
    settings = cfg(tmp_path / "short", tmp_path, quantize_method="gptq", calibration_samples=4)
    settings.sequence_len = 64  # Axolotl then tells the model that it takes so many
    rows = [{"input_ids": list(range(60))}] * 4
    made = quantized_base(settings, rows, tokenize)
    stored = json.loads((made / "config.json").read_text())["quantization_config"]
    assert stored["base"]["seq_len"] == 16


def test_calibration_data_are_part_of_the_key(dense, tmp_path):
    gptq = cfg(dense, tmp_path, quantize_method="gptq", calibration_samples=2)
    rows = [{"input_ids": [1, 2, 3, 4] * 8}]
    first = quantized_base(gptq, rows, tokenize)
    assert is_quantized(str(first))
    assert quantized_base(gptq, [{"input_ids": [4, 3, 2, 1] * 8}], tokenize) != first
    missing = cfg(dense, tmp_path, quantize_method="gptq", calibration=str(tmp_path / "no.txt"))
    with pytest.raises(ConfigError, match=r"no\.txt"):
        quantized_base(missing, rows, tokenize)


def test_a_refined_base_with_chosen_bits(dense, tmp_path):
    block = {"quantize_method": "gptq", "calibration_samples": 2, "bits": "auto"}
    block |= {"target_bits": 3.0, "refine": True, "refine_steps": 3, "refine_batch": 1}
    rows = [{"input_ids": [row % 50, 2, 3, 4] * 8} for row in range(8)]
    made = quantized_base(cfg(dense, tmp_path, **block), rows, tokenize)
    base = json.loads((made / "config.json").read_text())["quantization_config"]["base"]
    assert base["refined"]["steps"] == 3 and base["chosen_bits"]["target_bits"] == 3.0
    assert base["samples"] == 2  # of GPTQ: refining draws more
    other = quantized_base(cfg(dense, tmp_path, **{**block, "refine_steps": 2}), rows, tokenize)
    assert other != made
