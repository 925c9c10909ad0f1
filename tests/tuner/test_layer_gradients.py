"""Gradients against autograd through the dense formula, float64."""

import pytest
import torch

from qalora_kernels import PackedWeight, reference
from qalora_plugin import QALoRAConfig

SHAPES = [
    pytest.param(4, 64, False, id="4bit_g64_short"),
    pytest.param(3, 32, True, id="3bit_g32_short_act_order"),
    pytest.param(2, 16, True, id="2bit_g16_act_order"),
    pytest.param(8, -1, False, id="8bit_one_group"),
]


def _dense(adapted, x):
    """The formula of the folded layer in plain autograd."""
    base = adapted.base_layer
    scales, offsets = base.scales, base.offsets
    change = {name: weight for name, weight in adapted.matrices("default")}
    factor = adapted.scaling["default"]
    if "qalora_scale_A" in change:
        delta = change["qalora_scale_A"].t() @ change["qalora_scale_B"].t()
        scales = scales * (1 + factor * delta)
        offsets = scales * (offsets / base.scales)
    if "qalora_A" in change:
        offsets = offsets + factor * change["qalora_A"].t() @ change["qalora_B"].t()
    changed = PackedWeight(base.qweight, scales, offsets, base.g_idx, base.spec)
    return x @ reference.dequantize(changed, scales.dtype) + base.bias


def _gradients(function, adapted, x, dy):
    leaves = [x, adapted.base_layer.bias, *(w for _, w in adapted.matrices("default"))]
    return torch.autograd.grad(function(x), leaves, dy)


@pytest.mark.parametrize("additive", [False, True], ids=["folded", "additive"])
@pytest.mark.parametrize("adapt", ["zeros", "scales", "both"])
@pytest.mark.parametrize(("bits", "group_size", "act_order"), SHAPES)
def test_gradients(make_adapted, bits, group_size, act_order, adapt, additive):
    layer = {"bits": bits, "group_size": group_size, "act_order": act_order}
    adapted = make_adapted({"adapt": adapt}, grid=torch.float64, **layer).double()
    adapted.additive = additive
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 172, generator=gen, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 24, generator=gen, dtype=torch.float64)
    found = _gradients(adapted, adapted, x, dy)
    wanted = _gradients(lambda value: _dense(adapted, value), adapted, x, dy)
    assert len(found) == (6 if adapt == "both" else 4)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_gradients_of_several_adapters(make_adapted, fill_adapters):
    """Folding stacks the adapters along the rank: each still gets its own gradient."""
    adapted = make_adapted({"adapt": "both"}, grid=torch.float64)
    adapted.update_layer("other", QALoRAConfig(r=2, lora_alpha=5), "layer")
    fill_adapters(adapted)
    adapted.double().set_adapter(["default", "other"])
    x = torch.randn(4, 172, dtype=torch.float64)
    leaves = [w for name in ("default", "other") for _, w in adapted.matrices(name)]
    assert len(leaves) == 6
    found = torch.autograd.grad(adapted(x).square().sum(), leaves)
    adapted.additive = True
    wanted = torch.autograd.grad(adapted(x).square().sum(), leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_gradients_reach_bf16_training(make_adapted):
    """A bf16 input: fp32 gradients of A and B, near those in fp32."""
    adapted = make_adapted()
    x = torch.randn(16, 172)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        adapted.zero_grad()
        adapted(x.to(dtype)).float().square().mean().backward()
        grads[dtype] = [w.grad.clone() for _, w in adapted.matrices("default")]
    for full, low in zip(*grads.values(), strict=True):
        assert low.dtype == torch.float32
        assert (low - full).norm() <= 0.02 * full.norm()
