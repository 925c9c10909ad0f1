"""config.json against the tensors, in our own format."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qalora_kernels import QuantSpec
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from qalora_plugin.checkpoint.layout import pack_layer, read_layer
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.files.reader import CheckpointReader
from qalora_plugin.quantize.rtn import rtn

LAYER = "model.layers.0.mlp.down_proj"  # 172 inputs: six groups of 32, the last one short

State = dict[str, torch.Tensor]


def replace(part, change):
    def run(state):
        state[f"{LAYER}.{part}"] = change(state[f"{LAYER}.{part}"]).contiguous()

    return run


def remove(part):
    def run(state):
        del state[f"{LAYER}.{part}"]

    return run


def add(part, tensor):
    return lambda state: state.update({f"{LAYER}.{part}": tensor})


def drop_all(state):
    for name in [n for n in state if n.endswith((".qweight", ".scales", ".offsets"))]:
        del state[name]


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 3}, r"fit bits=4"),
    "group_size": ({"group_size": 64}, r"expected float16 \[\d, \d+\].*contradicts"),
    "group_size -1": ({"group_size": -1}, "contradicts the tensors"),
    "desc_act": ({"desc_act": True}, r"g_idx is missing"),
    "offsets_dtype": ({"offsets_dtype": "float32"}, r"offsets: expected float32"),
    "dynamic": ({"dynamic": {LAYER: {"bits": 8}}}, f"{LAYER}.qweight: expected 48 rows"),
    "not converted": ({"modules_to_not_convert": ["down_proj"]}, "modules_to_not_convert"),
    "newer format": ({"format_version": 2}, "update qalora-plugin"),
    "unknown key": ({"gruop_size": 32}, "gruop_size"),
    "impossible bits": ({"bits": 5}, "bits must be one of"),
    "no qweight": ({"tensors": remove("qweight")}, "scales and offsets but no qweight"),
    "no scales": ({"tensors": remove("scales")}, rf"{LAYER}\.scales is missing"),
    "no offsets": ({"tensors": remove("offsets")}, rf"{LAYER}\.offsets is missing"),
    "no guard": ({"tensors": remove("weight")}, "no guard tensor"),
    "dense twin": ({"tensors": add("weight", torch.ones(64, 172))}, "stored twice"),
    "wrong guard": ({"tensors": add("weight", torch.tensor([171.5]))}, "expected in_features"),
    "guard of another size": ({"tensors": add("weight", torch.tensor([64.0]))}, "contradicts"),
    "surplus g_idx": ({"tensors": add("g_idx", torch.zeros(172).int())}, "desc_act is false"),
    "surplus tensor": ({"tensors": add("zeros", torch.ones(2))}, "does not: zeros"),
    "stock zeros": ({"tensors": add("qzeros", torch.zeros(6, 8).int())}, "stock GPTQ layer"),
    "scales dtype": ({"tensors": replace("scales", lambda t: t.float())}, "expected float16"),
    "scales shape": ({"tensors": replace("scales", lambda t: t[:, :32])}, r"\[6, 32\]"),
    "flat qweight": ({"tensors": replace("qweight", lambda t: t.flatten())}, "out_features"),
    "no outputs": ({"tensors": replace("qweight", lambda t: t[:, :0])}, "out_features"),
    "qweight dtype": ({"tensors": replace("qweight", lambda t: t.long())}, "expected int32"),
    "nothing quantized": ({"tensors": drop_all}, "no tensor is a qweight"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_contradictions_are_refused(case, base_dir, altered):
    changes, message = HEADERS[case]
    directory = altered(base_dir, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        QuantizedCheckpoint(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("case", ["bits", "group_size", "no scales", "no guard", "desc_act"])
def test_transformers_refuses_them_too(case, base_dir, altered):
    changes, message = HEADERS[case]
    with pytest.raises((CheckpointError, ConfigError), match=message):
        AutoModelForCausalLM.from_pretrained(altered(base_dir, **changes))


VALUES = {
    "NaN scale": ("scales", math.nan, "scales: expected finite"),
    "infinite scale": ("scales", math.inf, "found 1 of 384"),
    "NaN offset": ("offsets", math.nan, "offsets: expected finite"),
}


def test_minima_that_are_not_finite(base_dir, altered):
    def overflow(state):
        state[f"{LAYER}.offsets"][2, 3:5] = -math.inf

    claimed = altered(base_dir, overflow, offsets_at="minimum")
    message = rf"{LAYER}\.offsets: expected finite numbers, found 2 of 384"
    with pytest.raises(CheckpointError, match=message):
        QuantizedCheckpoint(claimed).layer(LAYER)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(claimed)


def test_minima_with_offsets_in_fp32(base_dir, altered):
    with pytest.raises(CheckpointError, match=r"config\.json.*stores minima as offsets_dtype"):
        QuantizedCheckpoint(altered(base_dir, offsets_at="minimum", offsets_dtype="float32"))


@pytest.mark.parametrize("case", VALUES)
def test_impossible_numbers_are_refused(case, base_dir, altered):
    part, value, message = VALUES[case]

    def damage(state):
        state[f"{LAYER}.{part}"][0, 5] = value

    directory = altered(base_dir, damage)
    checkpoint = QuantizedCheckpoint(directory)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.layer(LAYER)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("bad", [-1, 6])
def test_group_index_out_of_range(bad, base_dir, altered):
    def act_order(state):
        for name in [n for n in state if n.endswith(".qweight")]:
            layer = name.removesuffix(".qweight")
            k = int(state[f"{layer}.weight"].item())
            state[f"{layer}.g_idx"] = torch.arange(k, dtype=torch.int32) // 32
        state[f"{LAYER}.g_idx"][3] = bad

    directory = altered(base_dir, act_order, desc_act=True)
    with pytest.raises(CheckpointError, match=r"from 0 to 5, found"):
        QuantizedCheckpoint(directory).layer(LAYER)
    with pytest.raises(CheckpointError, match=r"from 0 to 5, found"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_16_bit_model_is_not_a_base(dense_dir):
    with pytest.raises(CheckpointError, match=r"not quantized.*qalora quantize"):
        open_quantized(dense_dir)


def test_layers_and_plan(base_dir):
    checkpoint = open_quantized(base_dir)
    assert len(checkpoint.layers) == 14 and not checkpoint.is_foreign
    spec = checkpoint.layers[LAYER]
    assert (spec.in_features, spec.out_features, spec.num_groups) == (172, 64, 6)
    assert {"lm_head.weight", "model.norm.weight"} < set(checkpoint.dense_names)
    stored = {n: (i.dtype, i.shape) for n, i in checkpoint.reader.tensors.items()}
    assert checkpoint.plan() == stored
    found = pack_layer(LAYER, checkpoint.layer(LAYER))
    assert found.keys() == {n for n in stored if n.startswith(LAYER + ".")}
    for name, tensor in found.items():
        assert torch.equal(tensor, checkpoint.reader.get(name)), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_layer_and_read_layer_are_inverse(bits, tmp_path):
    torch.manual_seed(0)
    spec = QuantSpec(bits, 32, 172, 64)
    weight = rtn(torch.randn(64, 172), spec, name="w")
    weight = dataclasses.replace(weight, g_idx=torch.randperm(172).to(torch.int32) // 32)
    save_file(pack_layer("w", weight), tmp_path / "model.safetensors")
    found = read_layer(CheckpointReader(tmp_path), "w", spec)
    for field in ("qweight", "scales", "offsets", "g_idx"):
        assert torch.equal(getattr(found, field), getattr(weight, field)), field
