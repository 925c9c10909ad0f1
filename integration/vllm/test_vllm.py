"""Merged checkpoints in vLLM, fp32 on the CPU, against transformers on the same directory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.mixtures import mixture
from support.served import merged_quickstart, random_model, with_act_order
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized

HERE = Path(__file__).resolve().parent
TOKENS = 96
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 256, (n,), generator=GENERATOR).tolist() for n in (5, 40, 23)]
MIXED = {"q_proj": {"bits": 2}, "v_proj": {"bits": 8}, "up_proj": {"bits": 3, "group_size": 16}}

# name: (config, whether with biases, whether with act-order)
RANDOM = {
    "2 bits": ({"bits": 2}, False, False),
    "3 bits, one group": ({"bits": 3, "group_size": -1}, False, False),
    "8 bits, one group, act-order": ({"bits": 8, "group_size": -1}, False, True),
    "mixed bits": ({"bits": 4, "dynamic": MIXED}, False, False),
    "4 bits, act-order": ({"bits": 4}, False, True),
    "mixed bits, act-order, biases": ({"bits": 4, "dynamic": MIXED}, True, True),
    "8 bits, minima, biases": ({"bits": 8, "offsets_at": "minimum"}, True, False),
    "4 bits, minima, one in 16": (
        {"bits": 4, "offsets_at": "minimum", "group_size": 16},
        False,
        False,
    ),
    "3 bits, offsets in fp32": ({"bits": 3, "offsets_dtype": "float32"}, False, False),
}
QUICKSTART = {f"merged, {bits} bits": bits for bits in (2, 3, 4, 8)}
COMPILED = "merged, 4 bits, compiled"
MIXTURE = "mixture, experts in 16 bits"


@pytest.fixture(scope="session")
def models(tmp_path_factory, quickstart):
    """Directories of the models by name."""
    found = {"merged, 4 bits": quickstart / "merged", COMPILED: quickstart / "merged"}
    for name, bits in QUICKSTART.items():
        if name not in found:
            config = QALoRAQuantConfig(bits=bits, group_size=32)
            found[name] = merged_quickstart(tmp_path_factory.mktemp("merged"), config) / "merged"
    for name, (config, biases, act_order) in RANDOM.items():
        folder = tmp_path_factory.mktemp("random")
        model = random_model(folder, QALoRAQuantConfig(**config), biases=biases)
        found[name] = with_act_order(model, folder / "act_order") if act_order else model
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"vocab_size": 256, "hidden_size": 128, "max_position_embeddings": 256}
    mixture("mixtral", inner=64, **sizes).save_pretrained(folder / "dense")
    settings = {"method": "rtn", "modules_to_not_convert": ["experts"], "progress": False}
    found[MIXTURE] = quantize_model(folder / "dense", folder / "model", **settings).out
    return found


@pytest.fixture(scope="session")
def served(models, generate):
    """What vLLM says of each model: one process, with the compiled one as the last."""
    jobs = {
        name: {"model": str(directory), "ids": PROMPTS, "tokens": TOKENS}
        for name, directory in models.items()
    }
    jobs[COMPILED] |= {"enforce_eager": False}
    order = sorted(jobs, key=lambda name: name == COMPILED)
    return dict(zip(order, generate([jobs[name] for name in order]), strict=True))


@torch.no_grad()
def expected(directory):
    """Return log probabilities after each prompt token, and greedy tokens, from transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logprobs, tokens = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        logprobs.append(model(input_ids=ids).logits[0, :-1].log_softmax(-1))
        out = model.generate(
            ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None
        )
        tokens.append(out[0, len(prompt) :].tolist())
    return logprobs, tokens


@pytest.mark.parametrize("name", [*QUICKSTART, *RANDOM, MIXTURE, COMPILED])
def test_vllm_computes_what_transformers_computes(name, models, served):
    found = served[name]
    assert "error" not in found, found["error"]
    logprobs, tokens = expected(models[name])
    for theirs, ours in zip(found["logprobs"], logprobs, strict=True):
        theirs = torch.tensor(theirs)[..., 1]
        torch.testing.assert_close(theirs, ours, atol=5e-5, rtol=0)
        assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert found["tokens"] == tokens


@pytest.mark.parametrize(
    "name",
    [
        "mixed bits",
        "4 bits, act-order",
        "mixed bits, act-order, biases",
        "8 bits, minima, biases",
    ],
)
def test_every_rank_has_the_bits_of_its_part(name, models, programs, vllm_environment, tmp_path):
    checkpoint = open_quantized(models[name])
    dense = {layer: checkpoint.layer(layer).dequantize() for layer in checkpoint.layers}
    save_file(dense, tmp_path / "dense.safetensors")
    run = programs("vllm", **vllm_environment)
    printed = run(HERE / "ranks.py", models[name], tmp_path / "dense.safetensors")
    found = json.loads(printed.splitlines()[-1])
    assert found["wrong"] == found["stale"] == [] and found["compared"] == 2 * 4 * (1 + 2 + 4)
    assert found["experts"].startswith(
        "model.layers.0.mlp.experts: experts quantized by qalora are"
    )


def test_two_ranks_with_act_order(models, generate):
    model = models["4 bits, act-order"]
    job = {"model": str(model), "ids": PROMPTS, "tokens": TOKENS, "tensor_parallel_size": 2}
    (found,) = generate([job], VLLM_CPU_OMP_THREADS_BIND="0|1")
    assert "error" not in found, found["error"]
    logprobs, tokens = expected(model)
    for theirs, ours in zip(found["logprobs"], logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(theirs)[..., 1], ours, atol=5e-5, rtol=0)
    assert found["tokens"] == tokens


def test_without_the_plugin_vllm_refuses(models, generate):
    job = {"model": str(models["2 bits"]), "ids": PROMPTS, "tokens": 1}
    (found,) = generate([job], PYTHONPATH="")
    assert "Unknown quantization method: qalora" in found["error"]
    assert json.dumps(found).count("qalora_plugin") == 0
