"""Initialisation, size, memory, dropout, mixed batches, autocast and compiling of one layer."""

import math

import pytest
import torch
from support.layers import quant_layer
from torch.autograd.graph import saved_tensors_hooks

from qalora_plugin import QALoRAConfig
from qalora_plugin.tuner import QALoRALinear


def _new(layer, name="layer", **settings):
    return QALoRALinear(layer, "default", QALoRAConfig(r=4, **settings), name)  # type: ignore[arg-type]


def test_initialisation_hangs_on_seed_and_name_only():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _new(quant_layer(), adapt="both")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = _new(quant_layer(), adapt="both")
    for (name, one), (_, two) in zip(
        first.matrices("default"), again.matrices("default"), strict=True
    ):
        assert one.dtype == torch.float32
        assert torch.equal(one, two), name
    a = first.qalora_A["default"].weight
    for other in (_new(quant_layer(), seed=1), _new(quant_layer(), name="layer2")):
        assert not torch.equal(other.qalora_A["default"].weight, a)
    assert not torch.equal(first.qalora_scale_A["default"].weight, a)


def test_initialisation_moves_weights_as_far_as_loras():
    layer = _new(quant_layer(group_size=16, in_features=4096), adapt="both")
    for name, weight in layer.matrices("default"):
        bound = 1.0 if "scale" in name else 1 / math.sqrt(4096)
        if name.endswith("B"):
            assert not weight.any()
        else:
            assert 0.95 * bound < weight.abs().max() <= bound
    random = _new(quant_layer(), init_lora_weights=False)
    assert random.qalora_B["default"].weight.abs().max() > 0.4


def test_new_adapter_is_a_no_op():
    base = quant_layer()
    x = torch.randn(3, 172)
    wanted = base(x)
    for adapt in ("zeros", "scales", "both"):
        assert torch.equal(_new(quant_layer(), adapt=adapt)(x), wanted)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("adapt", ["zeros", "scales", "both"])
def test_size_and_saved_activations(adapt, act_order):
    """r * (G + N) parameters a part. Kept for the backward: pool(x), K/g numbers a token; with
    scales x itself, not a copy."""
    tokens, r, groups = 7, 4, 10
    layer = _new(quant_layer(group_size=16, in_features=160, act_order=act_order), adapt=adapt)
    trained = [p for p in layer.parameters() if p.requires_grad and p is not layer.bias]
    parts = 2 if adapt == "both" else 1
    assert sum(p.numel() for p in trained) == parts * r * (groups + layer.out_features)

    own = {t.data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    saved: list[torch.Tensor] = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved.append(tensor)
        return tensor

    x = torch.randn(tokens, 160, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).float().sum().backward()
    inputs = [t for t in saved if t.data_ptr() == x.data_ptr()]
    assert [t.shape for t in inputs] == ([] if adapt == "zeros" else [x.shape])
    others = [t for t in saved if t.data_ptr() != x.data_ptr()]
    assert sum(t.numel() for t in others) == (0 if adapt == "scales" else tokens * groups)
    assert all(t.dtype == torch.bfloat16 for t in others)


def test_dropout_adds_a_dropped_pool_in_training_only(make_adapted):
    plain = make_adapted({"lora_dropout": 0.0}, grid=torch.float32)
    adapted = make_adapted({"lora_dropout": 0.5}, grid=torch.float32)
    x = torch.randn(6, 172)
    torch.manual_seed(3)
    found = adapted(x)
    torch.manual_seed(3)
    pooled = torch.nn.functional.dropout(adapted.base_layer.pool(x), 0.5)
    low = pooled @ adapted.qalora_A["default"].weight.t() @ adapted.qalora_B["default"].weight.t()
    torch.testing.assert_close(found, adapted.base_layer(x) + 6 / 4 * low)
    assert not torch.equal(adapted(x), found)
    assert torch.equal(adapted.eval()(x), plain(x))


def test_disabled_layer_is_the_base(make_adapted):
    adapted = make_adapted()
    x = torch.randn(6, 172)
    base = adapted.base_layer(x)
    assert not torch.equal(adapted(x), base)
    adapted.merge()
    adapted.enable_adapters(False)
    assert torch.equal(adapted(x), base)
    assert not adapted.merged


def test_mixed_batch(make_adapted, fill_adapters):
    adapted = make_adapted().eval()
    adapted.update_layer("other", QALoRAConfig(r=2, adapt="scales"), "layer")
    fill_adapters(adapted)
    x = torch.randn(5, 2, 172)
    names = ["other", "__base__", "default", "other", "elsewhere"]
    mixed = adapted(x, adapter_names=names)
    for row, name in enumerate(names):
        adapted.set_adapter(name if name in adapted.scaling else [])
        torch.testing.assert_close(mixed[row], adapted(x[row : row + 1])[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="expected 5 names, found 2"):
        adapted(x, adapter_names=["default", "other"])
    adapted.set_adapter("default")
    adapted.merge()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        adapted(x, adapter_names=names)


@pytest.mark.parametrize("additive", [False, True], ids=["folded", "additive"])
def test_autocast_computes_in_its_dtype(make_adapted, additive):
    adapted = make_adapted({"adapt": "both"})
    adapted.additive = additive
    x = torch.randn(6, 172)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = adapted(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, adapted(x.bfloat16()))


@pytest.mark.parametrize("adapt", ["zeros", "both"])
def test_compiles_without_a_graph_break(make_adapted, adapt):
    adapted = make_adapted({"adapt": adapt}, act_order=True)
    x = torch.randn(6, 172, requires_grad=True)
    compiled = torch.compile(adapted, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (adapted, compiled):
        adapted.zero_grad()
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(w.grad for _, w in adapted.matrices("default"))])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(found, eager)
