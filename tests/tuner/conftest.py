"""Quantized models with adapters that are not a no-op."""

import pytest
import torch
from peft import get_peft_model
from support.layers import quant_layer, quantize
from support.models import llama

from qalora_plugin import QALoRAConfig
from qalora_plugin.tuner import QALoRALinear


def fill(module, std=0.05, seed=0):
    """Random A and B for every adapter below `module`, as after training."""
    gen = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, QALoRALinear):
            for adapter_name in layer.scaling:
                for _, weight in layer.matrices(adapter_name):
                    values = torch.randn(weight.shape, generator=gen, dtype=torch.float64)
                    weight.data.copy_(values * std)


@pytest.fixture
def fill_adapters():
    """`fill`."""
    return fill


@pytest.fixture
def make_adapted():
    """Build a QALoRALinear with random A and B; `adapter` are QALoRAConfig's settings."""

    def make(adapter=None, **layer):
        config = QALoRAConfig(**({"r": 4, "lora_alpha": 6} | (adapter or {})))
        adapted = QALoRALinear(quant_layer(**layer), "default", config, "layer")
        fill(adapted)
        return adapted

    return make


@pytest.fixture
def make_llama():
    """Build a quantized Llama of two layers; keywords go to `quantize`."""
    return lambda **options: quantize(llama(), **options)


@pytest.fixture
def make_peft(make_llama):
    """Build a Llama with a filled adapter; keywords are QALoRAConfig's settings."""

    def make(model=None, **adapter):
        config = QALoRAConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | adapter))  # type: ignore[arg-type]
        peft_model = get_peft_model(model or make_llama(), config)
        fill(peft_model)
        return peft_model.eval()

    return make


@pytest.fixture
def ids():
    """Token ids [2, 9]."""
    return torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
