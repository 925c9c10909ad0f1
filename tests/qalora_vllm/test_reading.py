"""What the vLLM plugin reads of a checkpoint; its integration tests run it in vLLM itself."""

import math
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file

from qalora_kernels.stored import StoredConfig
from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_vllm.reading import check_names, read_config, read_layer

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture
def tensors(base_dir):
    state = load_file(base_dir / "model.safetensors")
    return {n.removeprefix(f"{LAYER}."): t for n, t in state.items() if n.startswith(f"{LAYER}.")}


def test_importing_it_needs_neither_vllm_nor_the_plugin():
    code = (
        "import sys, qalora_vllm.reading; wrong = {'vllm', 'qalora_plugin', 'transformers', 'peft'}"
        "; sys.exit(' '.join(wrong & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_reads_every_key_that_we_write():
    written = QALoRAQuantConfig(bits=3, dynamic={"down_proj": {"bits": 8}}, desc_act=True).to_dict()
    config = read_config(written | {"offsets_at": "minimum"})
    assert config.spec_for(LAYER, 64, 8).bits == 8 and config.spec_for("x", 64, 8).bits == 3
    assert {field.name for field in fields(StoredConfig)} == {
        field.name for field in fields(QALoRAQuantConfig)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2, "zeros_at": 1}, "format_version 2 is not the one"),
        ({"zeros_at": 1}, "unexpected keyword argument 'zeros_at'"),
    ],
)
def test_a_config_that_it_does_not_know(changes, message):
    with pytest.raises(ValueError, match=message):
        read_config(QALoRAQuantConfig().to_dict() | changes)
    unversioned = QALoRAQuantConfig().to_dict()
    del unversioned["format_version"]
    with pytest.raises(ValueError, match="format_version 0"):
        read_config(unversioned)


def test_a_layer_is_the_one_that_transformers_loads(tensors, base_dir):
    found = read_layer(LAYER, tensors, StoredConfig(), 172)
    expected = open_quantized(base_dir).layer(LAYER)
    assert torch.equal(found.dequantize(), expected.dequantize())


DAMAGED = {
    "shape": ("scales", lambda t: t[:5], r"scales: expected torch.float16 \[6, 64\]"),
    "dtype": ("scales", lambda t: t.float(), "scales: expected torch.float16"),
    "NaN": ("offsets", lambda t: t.fill_(math.nan), "offsets: expected finite.*384 of 384"),
    "flat": ("qweight", lambda t: t.flatten(), "qweight: expected .rows, out_features."),
    "K": ("weight", lambda t: t - 1, "weight: expected 172.*found 171"),
    "dense": ("weight", lambda t: t.new_zeros(64, 172), "weight: expected the guard.*modules_to"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tensor_is_named(case, tensors):
    part, change, message = DAMAGED[case]
    tensors[part] = change(tensors[part])
    with pytest.raises(ValueError, match=rf"{LAYER}\.{message}"):
        read_layer(LAYER, tensors, StoredConfig(), 172)


@pytest.mark.parametrize("bad", [-1, 6])
def test_a_group_index_out_of_range(bad, tensors):
    tensors["g_idx"] = torch.full((172,), bad, dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"{LAYER}\.g_idx: expected group numbers from 0 to 5"):
        read_layer(LAYER, tensors, StoredConfig(desc_act=True), 172)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("qweight", None, "qweight is missing"),
        ("offsets", None, "offsets is missing"),
        ("weight", None, "weight is missing"),
        (None, "g_idx", "g_idx belongs to no layer"),
        (None, "qzeros", "qzeros belongs to no layer"),
    ],
)
def test_names_that_are_missing_or_surplus(remove, add, message, tensors):
    names = {f"{LAYER}.{part}" for part in {*tensors, "bias", add or "bias"} - {remove}}
    with pytest.raises(ValueError, match=rf"{LAYER}\.{message}"):
        check_names({*names, "model.norm.weight"}, StoredConfig())


def test_a_missing_tensor_is_named_where_no_names_are_known(tensors):
    del tensors["offsets"]
    with pytest.raises(ValueError, match=rf"{LAYER}\.offsets is missing"):
        read_layer(LAYER, tensors, StoredConfig(), 172)


def test_nothing_is_quantized():
    with pytest.raises(ValueError, match="no tensor is a qweight"):
        check_names({"model.norm.weight"}, StoredConfig())
