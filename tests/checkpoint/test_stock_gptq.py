"""Stock GPTQ checkpoints: files made by GPTQModel 5.8.0, and by an independent packer."""

import json
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora_kernels import PackedWeight, reference
from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.hf.routing import merge_configs

from .conftest import FIXTURES, STOCK

K, N = 96, 64


def pack_bits(values, bits):
    """[K, N] -> int32 [K*bits/32, N] as one little-endian bit string a column."""
    planes = (values[:, None, :] >> np.arange(bits)[None, :, None]) & 1  # [K, bits, N]
    words = planes.reshape(-1, 32, values.shape[1]).astype(np.uint64)
    packed = (words << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1)
    return packed.astype(np.uint32).view(np.int32)


def write_stock(directory, bits, group_size, version, act):
    """One layer as AutoGPTQ writes it; returns its dense weight [N, K]."""
    rng = np.random.default_rng(bits * 1000 + group_size)
    size = K if group_size == -1 else group_size
    groups = -(-K // size)
    codes = rng.integers(0, 1 << bits, (K, N))
    zeros = rng.integers(1, 1 << bits, (groups, N))  # what v1 can hold without a borrow
    scales = rng.uniform(0.01, 0.1, (groups, N)).astype(np.float16)
    g_idx = (rng.permutation(K) if act else np.arange(K)) // size
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {
        "a.qweight": pack_bits(codes, bits),
        "a.qzeros": pack_bits(stored.T, bits).T,
        "a.scales": scales,
        "a.g_idx": g_idx.astype(np.int32),
    }
    directory.mkdir(exist_ok=True)
    save_file(
        {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in tensors.items()},
        directory / "model.safetensors",
    )
    config = {"bits": bits, "group_size": group_size, "quant_method": "gptq"}
    config |= {"checkpoint_format": version, "desc_act": act, "sym": False}
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return (scales[g_idx].astype(np.float64) * (codes - zeros[g_idx])).T


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_exact(bits, group_size, act, version, tmp_path):
    dense = write_stock(tmp_path, bits, group_size, version, act)
    checkpoint = open_quantized(tmp_path)
    assert checkpoint.config.desc_act == (act and group_size in (16, 32, 64))
    assert checkpoint.config.offsets_dtype == "float32"
    layer, spec = checkpoint.layer("a"), checkpoint.layers["a"]
    weight = PackedWeight(layer.qweight, layer.scales, layer.offsets, layer.g_idx, spec)
    found = reference.dequantize(weight, torch.float64)
    assert np.array_equal(found.t().numpy(), dense)


@pytest.mark.parametrize("directory", STOCK, ids=lambda path: path.name)
def test_gptqmodel_files_load_without_gptqmodel(directory):
    reference = load_file(directory / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-5)
    weights = [name for name in reference if name.endswith(".weight")]
    assert weights
    for name in weights:
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.packed.dequantize(), reference[name]), name


def test_g_idx_is_kept_only_where_it_says_something():
    plain = open_quantized(FIXTURES / "gptq_4bit_g32_asym")
    act = open_quantized(FIXTURES / "gptq_4bit_g128_actorder_asym")
    assert not plain.config.desc_act and act.config.desc_act
    name = next(iter(plain.layers))
    assert f"{name}.g_idx" in plain.reader and plain.layer(name).g_idx is None
    assert any(act.layer(name).g_idx is not None for name in act.layers)


@pytest.fixture
def stock(tmp_path):
    """A changed copy of a fixture; `drop` leaves the config's quantization_config out."""

    def make(name="gptq_4bit_g32_asym", drop=False, **config):
        target = tmp_path / name
        shutil.copytree(FIXTURES / name, target)
        path = target / "config.json"
        values = json.loads(path.read_text())
        values["quantization_config"].update(config)
        if drop:
            del values["quantization_config"]
        path.write_text(json.dumps(values))
        return target

    return make


def test_saved_again_in_our_format(tmp_path):
    source = FIXTURES / "gptq_4bit_g128_actorder_asym"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    old, new = open_quantized(source), open_quantized(tmp_path / "ours")
    assert not new.is_foreign and new.config.base["producer"] == "gptqmodel:5.8.0"
    for name in old.layers:
        a, b = old.layer(name), new.layer(name)
        assert torch.equal(a.scales, b.scales) and torch.equal(a.offsets, b.offsets)
        assert torch.equal(a.qweight, b.qweight) and torch.equal(a.g_idx, b.g_idx)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_our_config_beside_the_stored_one(stock):
    directory = stock()
    config = QALoRAQuantConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    assert model.hf_quantizer.quantization_config.method == "gptq"
    with pytest.raises(ConfigError, match="group_size=32, but quantization_config asks for"):
        AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=QALoRAQuantConfig(bits=4, group_size=64)
        )


def test_quantize_config_json_alone(stock):
    directory = stock(drop=True)
    assert (
        open_quantized(directory).layers.keys()
        == open_quantized(FIXTURES / directory.name).layers.keys()
    )
    config = QALoRAQuantConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    assert model.hf_quantizer.quantization_config.offsets_dtype == "float32"
    with pytest.raises(ConfigError, match="bits=4, but quantization_config asks for bits=8"):
        AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=QALoRAQuantConfig(bits=8, group_size=32)
        )


def test_where_gptqmodel_is_installed_it_is_asked_first(monkeypatch):
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert merge_configs(stored, None).group_size == 128
    monkeypatch.setattr("qalora_plugin.hf.routing.find_spec", lambda name: name)
    assert merge_configs(stored, None) is None
    assert merge_configs(stored, QALoRAQuantConfig(4, 128)).group_size == 128
    assert merge_configs({"quant_method": "hqq", "bits": 4}, QALoRAQuantConfig()) is None


REFUSED = {
    "marlin": ({"checkpoint_format": "marlin"}, "'marlin' is not read"),
    "bits": ({"bits": 5}, "bits must be one of"),
    "other bits": ({"bits": 8}, "contradicts the tensors"),
    "group_size": ({"group_size": 64}, r"expected shape \[1, \d+\].*found \[2, \d+\]"),
    "group_size 0": ({"group_size": 0}, "a positive integer, or -1"),
    "packing": ({"pack_dtype": "int16"}, "pack_dtype"),
    "dynamic list": ({"dynamic": ["x"]}, "dynamic: expected an object"),
    "dynamic option": ({"dynamic": {"+:.*": {"adapter": 1}}}, r"dynamic\['\+:\.\*'\]"),
    "dynamic pattern": ({"dynamic": {"+:(": {"bits": 4}}}, "not a regular expression"),
    **{
        method: ({"quant_method": method}, f"found quant_method .{method}.*{stores}.*16-bit")
        for method, stores in (
            ("hqq", "groups that may lie along the outputs"),
            ("bitsandbytes", "no integers with a scale .NF4"),
            ("fp8", "8-bit floats .FP8"),
            ("modelopt", "NVFP4"),
            ("mxfp4", "4-bit floats .MXFP4"),
            ("eetq", ""),
        )
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case, stock):
    config, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_quantized(stock(**config))


DAMAGE: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing qzeros": (lambda s: s.update(b=s.pop("a.qzeros")), "a.qzeros is missing"),
    "cut off": (lambda s: s.update({"a.g_idx": torch.zeros(108).int()}), "multiples of 32"),
    "int64": (lambda s: s.update({"a.qzeros": s["a.qzeros"].long()}), "expected int32"),
    "integer scales": (lambda s: s.update({"a.scales": s["a.scales"].int()}), "expected floats"),
    "flat": (lambda s: s.update({"a.qweight": s["a.qweight"].flatten()}), "out_features"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_layers(case, tmp_path):
    write_stock(tmp_path, 4, 32, "gptq", False)
    state = load_file(tmp_path / "model.safetensors")
    damage, message = DAMAGE[case]
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_quantized(tmp_path)


def test_scales_that_fp16_does_not_hold(tmp_path):
    write_stock(tmp_path, 4, 32, "gptq", False)
    state = load_file(tmp_path / "model.safetensors")
    state["a.scales"] = state["a.scales"].float()
    save_file(state, tmp_path / "model.safetensors")
    open_quantized(tmp_path).layer("a")  # fp32, but still the fp16 numbers
    state["a.scales"][0, 0] += 1e-7
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="float16 does not hold"):
        open_quantized(tmp_path).layer("a")


def test_dynamic_overrides(tmp_path):
    dense = write_stock(tmp_path, 8, 16, "gptq_v2", False)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {
        "bits": 4,
        "group_size": 32,
        "dynamic": {"-:.*lm_head.*": {}, "+:^a$": {"bits": 8, "group_size": 16}},
    }
    path.write_text(json.dumps(config))
    checkpoint = open_quantized(tmp_path)
    assert checkpoint.config.dynamic == {"a": {"bits": 8, "group_size": 16}}
    assert checkpoint.config.spec_for("a", K, N) == checkpoint.layers["a"]
    assert dense.shape == (N, K)


def test_all_zero_biases_that_the_model_does_not_have(tmp_path, caplog):
    source = FIXTURES / "gptq_4bit_g32_asym"
    shutil.copytree(source, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    for name in [n for n in state if n.endswith(".qweight")]:
        n = state[name].shape[1]
        state[name.replace("qweight", "bias")] = torch.zeros(n, dtype=torch.float16)
    save_file(state, tmp_path / "m" / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert model.model.layers[0].mlp.up_proj.bias is None
    state["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(state, tmp_path / "m" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert model.model.layers[0].mlp.up_proj.bias[3] == 1
