"""Checkpoints that vLLM must not serve: each ends in one error, which names the tensor."""

import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.served import change_config, random_model

from qalora_plugin import QALoRAQuantConfig

LAYER = "model.layers.0.mlp.down_proj"
JOINED = "model.layers.1.self_attn.k_proj"


def remove(name):
    return lambda state: state.pop(name)


def put(name, change):
    def alter(state):
        state[name] = change(state[name].clone())

    return alter


def poison(value):
    def alter(tensor):
        tensor[0, 5] = value
        return tensor

    return alter


def quantize_head(state):
    state["lm_head.qweight"] = torch.zeros(16, 256, dtype=torch.int32)
    for part in ("scales", "offsets"):
        state[f"lm_head.{part}"] = torch.ones(4, 256, dtype=torch.float16)
    state["lm_head.weight"] = torch.tensor([128.0])


# name: (change of the tensors, changes of the config, what the error says)
CASES = {
    "newer format": (None, {"format_version": 2}, "format_version 2 is not the one"),
    "unknown key": (None, {"zeros_at": 1}, "zeros_at"),
    "other bits": (None, {"bits": 3}, r"proj\.(qweight|scales): expected"),
    "other groups": (None, {"group_size": 64}, r"proj\.(offsets|scales): expected"),
    "lacks g_idx": (None, {"desc_act": True}, r"proj\.g_idx is missing"),
    "no scales": (remove(f"{JOINED}.scales"), {}, rf"{JOINED}\.scales is missing"),
    "no qweight": (remove(f"{LAYER}.qweight"), {}, rf"{LAYER}\.qweight is missing"),
    "no guard": (remove(f"{LAYER}.weight"), {}, rf"{LAYER}\.weight is missing"),
    "no bias": (remove(f"{JOINED}.bias"), {}, rf"{JOINED}\.bias is missing"),
    "wrong guard": (put(f"{LAYER}.weight", lambda t: t + 1), {}, rf"{LAYER}\.weight: expected 172"),
    "dense twin": (
        put(f"{LAYER}.weight", lambda t: torch.ones(128, 172)),
        {},
        rf"{LAYER}\.weight: expected the guard",
    ),
    "cut scales": (
        put(f"{JOINED}.scales", lambda t: t[:, :32].contiguous()),
        {},
        rf"{JOINED}\.scales: expected",
    ),
    "wide scales": (put(f"{LAYER}.scales", lambda t: t.float()), {}, rf"{LAYER}\.scales: expected"),
    "fewer columns": (
        put(f"{JOINED}.qweight", lambda t: t[:, :32].contiguous()),
        {},
        rf"{JOINED}\.(scales|offsets): expected",
    ),
    "NaN scale": (put(f"{LAYER}.scales", poison(math.nan)), {}, rf"{LAYER}\.scales: .*1 of"),
    "infinite offset": (
        put(f"{JOINED}.offsets", poison(math.inf)),
        {},
        rf"{JOINED}\.offsets: .*1 of",
    ),
    "quantized head": (quantize_head, {}, r"lm_head\.qweight: .*not served"),
    "half of qkv": (None, {"modules_to_not_convert": ["q_proj"]}, r"qkv_proj: .*some of them only"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory, generate):
    """What vLLM says of each damaged checkpoint: one process."""
    folder = tmp_path_factory.mktemp("refused")
    model = random_model(folder, QALoRAQuantConfig(bits=4, group_size=32), biases=True)
    jobs = []
    for number, (change, config, _) in enumerate(CASES.values()):
        target = folder / str(number)
        shutil.copytree(model, target)
        state = load_file(target / "model.safetensors")
        if change is not None:
            change(state)
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        change_config(target, **config)
        jobs.append({"model": str(target), "ids": [[1, 2, 3]], "tokens": 1})
    return dict(zip(CASES, generate(jobs), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_error_names_the_tensor(case, refusals):
    assert "error" in refusals[case], "vLLM served it"
    assert re.search(CASES[case][2], refusals[case]["error"])
