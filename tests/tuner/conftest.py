"""Builders of small quantized layers and models, and of adapters that are not a no-op."""

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qalora_kernels import QuantSpec
from qalora_plugin import QALoRAConfig
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.quantize.rtn import rtn
from qalora_plugin.tuner import QALoRALinear


def _spec(bits: int, group_size: int, k: int, n: int, grid: torch.dtype | None) -> QuantSpec:
    """`grid` fp32 or fp64: folding rounds to nothing coarser, so that formulas can be compared."""
    dtype = grid or torch.float16
    return QuantSpec(bits, group_size, k, n, offsets_dtype=dtype, scales_dtype=dtype)


@pytest.fixture
def make_layer() -> Callable[..., QuantLinear]:
    """Build a QuantLinear of random integers."""

    def make(
        bits: int = 4,
        group_size: int = 32,
        in_features: int = 172,
        out_features: int = 24,
        act_order: bool = False,
        grid: torch.dtype | None = None,
    ) -> QuantLinear:
        gen = torch.Generator().manual_seed(bits * 1000 + in_features)
        spec = _spec(bits, group_size, in_features, out_features, grid)
        shape = (spec.num_groups, out_features)
        g_idx = None
        if act_order:
            order = torch.randperm(in_features, generator=gen)
            g_idx = torch.arange(in_features)[order] // spec.group_size
        codes = torch.randint(
            1 << bits, (out_features, in_features), generator=gen, dtype=torch.uint8
        )
        scales = 0.005 + 0.02 * torch.rand(shape, generator=gen, dtype=torch.float64)
        offsets = 0.02 * torch.randn(shape, generator=gen, dtype=torch.float64)
        bias = torch.randn(out_features, generator=gen, dtype=grid or torch.float32)
        return QuantLinear.from_codes(spec, codes, scales, offsets, g_idx, bias)

    return make


def fill(module: nn.Module, std: float = 0.05, seed: int = 0) -> None:
    """Random A and B for every adapter below `module`, as after training."""
    gen = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, QALoRALinear):
            for adapter_name in layer.scaling:
                for _, weight in layer.matrices(adapter_name):
                    values = torch.randn(weight.shape, generator=gen, dtype=torch.float64)
                    weight.data.copy_(values * std)


@pytest.fixture
def make_adapted(make_layer: Callable[..., QuantLinear]) -> Callable[..., QALoRALinear]:
    """Build a QALoRALinear with random A and B; `adapter` are QALoRAConfig's settings."""

    def make(adapter: dict | None = None, **layer: object) -> QALoRALinear:
        config = QALoRAConfig(**({"r": 4, "lora_alpha": 6} | (adapter or {})))
        adapted = QALoRALinear(make_layer(**layer), "default", config, "layer")
        fill(adapted)
        return adapted

    return make


def quantize(
    model: PreTrainedModel,
    bits: int = 4,
    group_size: int = 16,
    act_order: bool = False,
    grid: torch.dtype | None = None,
    skip: tuple[str, ...] = ("lm_head", "embed_out", "classifier", "score", "pooler"),
) -> PreTrainedModel:
    """Replace every nn.Linear but the heads by a QuantLinear of its rounded weight."""
    for index, (name, linear) in enumerate(list(model.named_modules())):
        if type(linear) is not nn.Linear or name.rpartition(".")[2] in skip:
            continue
        n, k = linear.weight.shape
        spec = _spec(bits, group_size, k, n, grid)
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(index))
        weight = linear.weight.detach()[:, order].float()
        found = rtn(weight, spec, name=name)
        back = order.argsort()
        g_idx = (torch.arange(k) // spec.group_size)[back] if act_order else None
        layer = QuantLinear.from_codes(
            spec, found.codes()[:, back], found.scales, found.offsets, g_idx, linear.bias
        )
        model.set_submodule(name, layer)
    return model.eval()


@pytest.fixture
def make_llama() -> Callable[..., PreTrainedModel]:
    """Build a quantized Llama of two layers; keywords go to `quantize`."""

    def make(**options: object) -> PreTrainedModel:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        )
        return quantize(LlamaForCausalLM(config), **options)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_peft(make_llama: Callable[..., PreTrainedModel]) -> Callable[..., PeftModel]:
    """Build a Llama with a filled adapter; keywords are QALoRAConfig's settings."""

    def make(model: PreTrainedModel | None = None, **adapter: object) -> PeftModel:
        config = QALoRAConfig(**({"r": 4, "task_type": "CAUSAL_LM"} | adapter))  # type: ignore[arg-type]
        peft_model = get_peft_model(model or make_llama(), config)
        fill(peft_model)
        return peft_model.eval()

    return make


@pytest.fixture
def fill_adapters() -> Callable[..., None]:
    """`fill`."""
    return fill


@pytest.fixture
def quantize_linears() -> Callable[..., PreTrainedModel]:
    """`quantize`."""
    return quantize


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [2, 9]."""
    return torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(1))
