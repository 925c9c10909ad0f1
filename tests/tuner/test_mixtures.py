"""Adapted experts: exact merges, gradients against transformers' own fused experts in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from support.layers import quantize
from support.mixtures import mixture
from torch import nn
from torch.func import functional_call

from qalora_kernels import reference
from qalora_plugin import QALoRAConfig
from qalora_plugin.architecture.experts import ExpertNames, Experts
from qalora_plugin.tuner import QALoRALinear

GRIDS = [(2, 16), (3, 16), (4, 32), (8, -1)]  # 44 inputs of down: groups of 16 and 32 are short


def _unfused(model):
    """Give every block of a model with "mlp.experts" unfused experts with the same weights."""
    for block in model.model.layers:
        fused = block.mlp.experts
        experts = Experts(copy.deepcopy(fused), ExpertNames())
        inner = fused.down_proj.shape[2]
        for index in range(experts.num_experts):
            expert = experts.get_submodule(str(index))
            parts = (fused.gate_up_proj[index, :inner], fused.gate_up_proj[index, inner:])
            for name, part in zip(ExpertNames(), (*parts, fused.down_proj[index]), strict=True):
                expert.get_submodule(name).weight = nn.Parameter(part.detach().clone())
        block.mlp.experts = experts
    return model


def _adapted(bits, group_size, adapt, fill_adapters):
    """(transformers' fused experts of one layer, ours with filled adapters), in float64."""
    model = mixture("qwen3_moe").double()
    fused = copy.deepcopy(model.model.layers[0].mlp.experts)
    model = quantize(_unfused(model), bits=bits, group_size=group_size, grid=torch.float64)
    peft_model = get_peft_model(model, QALoRAConfig(r=4, adapt=adapt)).double()
    fill_adapters(peft_model)
    fused.config._experts_implementation = "eager"
    return fused, peft_model.base_model.model.model.layers[0].mlp.experts


def _dense(layer):
    """W' [N, K] of an adapted layer by the formula, differentiable in A and B."""
    base, factor = layer.base_layer, layer.scaling["default"]
    a, b, sa, sb = (
        getattr(layer, name)["default"].weight if "default" in getattr(layer, name) else None
        for name in layer.adapter_layer_names
    )
    share = 1.0 if sa is None else 1 + factor * (sb @ sa).t()
    change = 0.0 if a is None else factor * (b @ a).t()
    scales, offsets = base.scales * share, base.offsets * share + change
    weight = replace(base.packed, scales=scales, offsets=offsets)
    return reference.dequantize(weight, torch.float64).t()


def _routed(tokens=24):
    """(hidden states, chosen experts, weights): no token goes to expert 5."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 32, generator=gen, dtype=torch.float64)
    chosen = torch.rand(tokens, 7, generator=gen).topk(2).indices
    chosen[chosen >= 5] += 1
    weights = torch.rand(tokens, 2, generator=gen, dtype=torch.float64)
    return hidden, chosen, weights


@pytest.mark.parametrize("adapt", ["zeros", "scales", "both"])
@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
def test_gradients(bits, group_size, adapt, fill_adapters):
    fused, experts = _adapted(bits, group_size, adapt, fill_adapters)
    experts.train()
    hidden, chosen, weights = _routed()
    hidden.requires_grad_()
    weights.requires_grad_()
    matrices = [
        w
        for m in experts.modules()
        if isinstance(m, QALoRALinear)
        for _, w in m.matrices("default")
    ]
    leaves = [hidden, weights, *matrices]
    assert len(matrices) == 8 * 3 * (4 if adapt == "both" else 2)

    found = experts(hidden, chosen, weights)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(found, leaves, dy)
    every = [
        [_dense(expert.get_submodule(n)) for n in ExpertNames()] for expert in experts.children()
    ]
    fused_weights = {
        "gate_up_proj": torch.stack([torch.cat(parts[:2]) for parts in every]),
        "down_proj": torch.stack([parts[2] for parts in every]),
    }
    wanted = functional_call(fused, fused_weights, (hidden, chosen, weights))
    theirs = torch.autograd.grad(wanted, leaves, dy)

    assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 1e-10 * other.norm()
    unreached = {
        id(w)
        for m in experts.get_submodule("5").modules()
        if isinstance(m, QALoRALinear)
        for _, w in m.matrices("default")
    }
    for leaf, gradient in zip(leaves, ours, strict=True):
        assert bool(gradient.any()) == (id(leaf) not in unreached)


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@torch.no_grad()
def test_folded_additive_and_merged_agree(bits, group_size, fill_adapters):
    _, experts = _adapted(bits, group_size, "both", fill_adapters)
    routed = _routed()
    folded = experts(*routed)
    layers = [m for m in experts.modules() if isinstance(m, QALoRALinear)]
    for layer in layers:
        layer.additive = True
    assert (experts(*routed) - folded).norm() <= 1e-12 * folded.norm()
    for layer in layers:
        layer.additive = False
        layer.merge()
    assert torch.equal(experts(*routed), folded)


def test_an_expert_that_no_token_reaches_keeps_its_bits(fill_adapters):
    _, experts = _adapted(4, 16, "both", fill_adapters)
    experts.train()
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in experts.parameters() if p.requires_grad], lr=0.1)
    experts(*_routed()).square().sum().backward()
    optimizer.step()
    for name, tensor in experts.state_dict().items():
        is_trained = "qalora" in name and not name.startswith("5.")
        assert torch.equal(tensor, before[name]) != is_trained, name
