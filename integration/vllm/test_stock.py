"""Exports in vLLM as it is, without this project's plugin: run exactly, refused, or misread."""

import shutil

import pytest
import torch
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_plugin import export_model, merge_adapter, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.quickstart.embedded import base_model_path

TOKENS = 48
# what the quickstart's model is asked
TEXT = "### Task\nReturn the absolute value of a number.\nName: fabs\n### Answer\n"
IDS = AutoTokenizer.from_pretrained(base_model_path())(TEXT)["input_ids"]
PROMPTS = [IDS[:n] for n in (5, 40, 23)]
STOCK = {"PYTHONPATH": ""}

# name: (format, bits, zero-points of the base, act-order)
EXPORTS = {
    "compressed-tensors, 4 bits": ("compressed-tensors", 4, "integer", False),
    "compressed-tensors, 4 bits, symmetric": ("compressed-tensors", 4, "none", False),
    "compressed-tensors, 3 bits": ("compressed-tensors", 3, "integer", False),
    "compressed-tensors, 2 bits": ("compressed-tensors", 2, "integer", False),
    "gptq, 4 bits, symmetric": ("gptq", 4, "none", False),
}
CONTROL = "16 bits"  # the model before it was quantized: what computing in fp16 costs by itself
REFUSED = {
    "compressed-tensors, 8 bits": ("compressed-tensors", 8, "integer", False),
    "gptq, 4 bits": ("gptq", 4, "integer", False),
    "gptq, 3 bits": ("gptq", 3, "none", False),
    "gptq, 4 bits, symmetric, act-order": ("gptq", 4, "none", True),
}


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """`merged(bits, zero_points, desc_act)`: the quickstart's base with trained scales merged."""
    made = {}

    def make(*key):
        if key not in made:
            bits, zero_points, desc_act = key
            folder = tmp_path_factory.mktemp("merged")
            ids = torch.tensor(PROMPTS[1:2] * 4)
            settings = {"calibration": ids, "mse": False} if desc_act else {}  # quick
            quantize_model(
                base_model_path(),
                folder / "base",
                bits=bits,
                method="gptq" if desc_act else "rtn",
                zero_points=zero_points,
                desc_act=desc_act,
                **settings,
            )
            source = open_quantized(folder / "base")
            random_adapter(source, folder / "adapter", "scales", rank=8, size=0.05)
            merge_adapter(folder / "adapter", folder / "merged", folder / "base")
            made[key] = folder / "merged"
        return made[key]

    return make


@pytest.fixture(scope="session")
def served(merged, tmp_path_factory, generate):
    """What stock vLLM says of every export in fp16, in one process."""
    jobs = {}
    for name, (format, *key) in (EXPORTS | REFUSED).items():
        out = export_model(merged(*key), tmp_path_factory.mktemp("export") / "model", format).out
        jobs[name] = {"model": str(out), "ids": PROMPTS, "tokens": TOKENS, "dtype": "float16"}
    jobs[CONTROL] = jobs[name] | {"model": str(base_model_path())}
    return dict(zip(jobs, generate(list(jobs.values()), **STOCK), strict=True))


@torch.no_grad()
def differences(model, found):
    """Return how far vLLM's log-probabilities are from a model's, over all tokens, by prompt."""
    apart = []
    for prompt, theirs in zip(PROMPTS, found["logprobs"], strict=True):
        ours = model(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        apart.append((torch.tensor(theirs)[..., 1] - ours).abs().max().item())
    return apart


@pytest.fixture(scope="session")
def fp16_alone(served):
    """How far the 16-bit model in vLLM's fp16 is from itself in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32)
    return max(differences(model, served[CONTROL]))


@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_runs_it_exactly(name, served, merged, fp16_alone):
    found = served[name]
    assert "error" not in found, found["error"]
    model = AutoModelForCausalLM.from_pretrained(merged(*EXPORTS[name][1:]), dtype=torch.float32)
    difference = max(differences(model, found))
    print(f"{name}: log-probabilities differ by {difference:.1e}, in 16 bits by {fp16_alone:.1e}")
    assert difference < 1.5 * fp16_alone
    if "4 bits" in name:
        assert difference < 0.01  # the documentation promises it
    for prompt, chosen in zip(PROMPTS, found["tokens"], strict=True):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert chosen == out[0, len(prompt) :].tolist()


WHY = {
    "compressed-tensors, 8 bits": "Failed to find a kernel",
    "gptq, 4 bits": "Unsupported quantization config: bits=4, sym=False",
    "gptq, 3 bits": "Unsupported quantization config: bits=3",
    "gptq, 4 bits, symmetric, act-order": "desc_act=True",
}


@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_what_it_has_no_kernel_for(name, served):
    assert WHY[name] in served[name]["error"]


def test_vllm_refuses_torchao_exports(quickstart, env_python, run_json, vllm_environment, tmp_path):
    """It would copy fp32 zero-points into integers, were it not for the type in the config."""
    libraries, site = tmp_path / "libraries", env_python("export").parents[1]
    libraries.mkdir()
    for path in site.glob("lib/python3*/site-packages/torchao*"):
        (libraries / path.name).symlink_to(path)
    assert {path.name.partition("-")[0] for path in libraries.iterdir()} == {"torchao"}
    out = export_model(quickstart / "merged", tmp_path / "torchao", "torchao").out
    other = shutil.copytree(out, tmp_path / "other")
    path = other / "config.json"
    path.write_text(path.read_text().replace('"int7"', '"int4"'))  # the type that the layers have
    arguments = (env_python("vllm"), "integration/vllm/torchao_layers.py", out, other)
    found, taken = run_json(*arguments, **vllm_environment | {"PYTHONPATH": libraries})
    assert set(found) == set("qkvo")
    assert all("metadata mismatch" in str(raised) for raised in found.values()), found
    assert set(taken.values()) == {None}
