"""SmolLM2-135M, a real base in GGUF's Q4_1, in vLLM: fp32, and bf16 beside its 16-bit weights."""

import pytest
import torch
from support.smollm2 import find_smollm2
from torch import nn
from transformers import AutoModelForCausalLM

from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.layers.linear import QuantLinear

TEXTS = (8, 24)  # tokens
LIKELIEST = 50


def dequantize(model):
    """Replace the quantized layers of a model by dense ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(layer.packed.dequantize().t().contiguous())
            model.set_submodule(name, dense)
    model.config.quantization_config = None
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The imported base in `qalora`, and its weights in bf16 in `dense`."""
    source = find_smollm2()
    folder = tmp_path_factory.mktemp("smollm2")
    import_model(source, folder / "qalora")
    model = AutoModelForCausalLM.from_pretrained(folder / "qalora", dtype=torch.float32)
    dequantize(model).to(torch.bfloat16).save_pretrained(folder / "dense")
    return folder


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40000, (n,), generator=generator).tolist() for n in TEXTS]


@pytest.fixture(scope="module")
def served(folder, prompts, generate):
    jobs = {
        ("qalora", "float32"): {},
        ("qalora", "bfloat16"): {},
        ("dense", "bfloat16"): {},
    }
    for (model, dtype), job in jobs.items():
        job |= {"model": str(folder / model), "dtype": dtype, "ids": prompts}
        job |= {"tokens": 32, "logprobs": LIKELIEST}
    return dict(zip(jobs, generate(list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
@torch.no_grad()
def exact(folder, prompts):
    """Log probabilities in fp32 from transformers, and the greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder / "qalora", dtype=torch.float32)
    ids = [torch.tensor([prompt]) for prompt in prompts]
    options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    tokens = [model.generate(x, **options)[0, x.shape[1] :].tolist() for x in ids]
    return [model(input_ids=x).logits[0, :-1].log_softmax(-1) for x in ids], tokens


def differences(found, logprobs):
    """Return how far the likeliest tokens' log probabilities are from the exact ones."""
    assert "error" not in found, found["error"]
    gaps = []
    for rows, ours in zip(found["logprobs"], logprobs, strict=True):
        for row, expected in zip(rows, ours, strict=True):
            gaps += [value - float(expected[token]) for token, value in row]
    return torch.tensor(gaps)


def test_fp32_is_exact(served, exact):
    logprobs, tokens = exact
    found = served["qalora", "float32"]
    assert differences(found, logprobs).abs().max() < 1e-4
    assert found["tokens"] == tokens


def test_bf16_is_as_close_as_the_16_bit_model(served, exact):
    ours, dense = (
        differences(served[model, "bfloat16"], exact[0]).pow(2).mean().sqrt()
        for model in ("qalora", "dense")
    )
    assert ours < 1.5 * dense
