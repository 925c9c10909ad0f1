"""Merged, folded and additive forward agree: bit for bit where they must, to rounding elsewhere."""

import pytest
import torch

from qalora_kernels import reference
from qalora_plugin import QALoRAConfig

MODES = ("zeros", "scales", "both")
# every group size with and without act-order, every width with both
CASES = [
    (2, 16, False), (2, 32, True), (3, 32, False), (3, 64, True), (4, 64, False),
    (4, 128, True), (8, 128, False), (8, 16, True), (4, -1, False), (3, -1, True),
]  # fmt: skip


def _relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def _cases(adapted, x):
    """(folded, additive, merged, restored) outputs; `restored` after unmerging."""
    base = adapted.base_layer
    before = base.scales, base.offsets
    folded = adapted(x)
    adapted.additive = True
    additive = adapted(x)
    adapted.additive = False
    adapted.merge()
    assert adapted.merged
    assert not torch.equal(base.offsets, before[1])
    merged = adapted(x)
    adapted.unmerge()
    assert not adapted.merged
    assert torch.equal(base.scales, before[0])
    assert torch.equal(base.offsets, before[1])
    return folded, additive, merged, adapted(x)


@pytest.mark.parametrize(("bits", "group_size", "act_order"), CASES)
@torch.no_grad()
def test_paths_agree(make_adapted, bits, group_size, act_order):
    _check_paths(make_adapted, 172, bits=bits, group_size=group_size, act_order=act_order)


@pytest.mark.parametrize(("bits", "group_size", "act_order"), [(4, 128, True), (3, 64, False)])
@torch.no_grad()
def test_paths_agree_for_4096_inputs(make_adapted, bits, group_size, act_order):
    layer = {"bits": bits, "group_size": group_size, "act_order": act_order, "out_features": 256}
    _check_paths(make_adapted, 4096, **layer)


def _check_paths(make_adapted, in_features, **layer):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, in_features, generator=gen, dtype=torch.float64)
    for adapt in MODES:
        # as stored: fp16 scales and offsets
        adapted = make_adapted({"adapt": adapt}, in_features=in_features, **layer)
        for dtype in (torch.float32, torch.bfloat16):
            folded, _, merged, restored = _cases(adapted, x.to(dtype))
            assert folded.dtype == dtype
            assert torch.equal(merged, folded)
            assert torch.equal(restored, folded)
        # a grid that rounds no coarser than the computation
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            adapted = make_adapted({"adapt": adapt}, in_features=in_features, grid=dtype, **layer)
            adapted.to(dtype)
            folded, additive, merged, _ = _cases(adapted, x.to(dtype))
            assert torch.equal(merged, folded)
            assert _relative(additive, merged) < tolerance


@torch.no_grad()
def test_folded_is_the_dense_formula(make_adapted):
    """One check against the reference that shares no code with the layer."""
    adapted = make_adapted({"r": 4, "lora_alpha": 6}, act_order=True, grid=torch.float64)
    base = adapted.base_layer
    x = torch.randn(5, 172, dtype=torch.float64)
    a, b = (adapted.get_submodule(f"qalora_{name}.default").weight.double() for name in "AB")
    pooled = reference.pool(x, base.g_idx, base.spec.group_size)
    wanted = x @ reference.dequantize(base.packed, torch.float64) + base.bias
    wanted += 6 / 4 * (pooled @ a.t() @ b.t())
    assert _relative(adapted(x), wanted) < 1e-12


@torch.no_grad()
def test_scales_keep_the_zero_point(make_adapted):
    adapted = make_adapted({"adapt": "scales"}, grid=torch.float64)
    base = adapted.base_layer
    zero_points = base.offsets / base.scales
    adapted.merge()
    assert _relative(base.offsets / base.scales, zero_points) < 1e-15


@torch.no_grad()
def test_several_adapters_sum(make_adapted, fill_adapters):
    adapted = make_adapted({"adapt": "zeros"}, grid=torch.float64)
    adapted.update_layer("other", QALoRAConfig(r=2, lora_alpha=1, adapt="both"), "layer")
    fill_adapters(adapted)
    adapted.double()
    x = torch.randn(5, 172, dtype=torch.float64)
    alone = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        alone[name] = adapted(x)
    adapted.set_adapter(["default", "other"])
    folded, additive, merged, _ = _cases(adapted, x)
    assert torch.equal(merged, folded)
    assert _relative(additive, merged) < 1e-12
    # one after the other gives the same numbers
    adapted.merge(adapter_names=["default"])
    assert torch.equal(adapted(x), alone["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        adapted.merge(adapter_names=["default", "other"])
    assert torch.equal(adapted(x), folded)
    adapted.unmerge()
    assert torch.equal(adapted(x), folded)
    base = adapted.base_layer(x)
    assert _relative(alone["default"] + alone["other"] - base, folded) < 1e-12
