"""`ShardedQuantLinear` computes what `QuantLinear` does, from what DeepSpeed and FSDP can shard."""

import copy

import pytest
import torch
from support.layers import quant_layer

from qalora_kernels import LowRank
from qalora_plugin.layers import sharded
from qalora_plugin.layers.sharded import ShardedQuantLinear, unpack_grid

K, N, R = 80, 24, 4


# offsets_dtype, offsets_at and words of the grid for each scale and offset
STORED = [(torch.float16, "middle", 1), (torch.float32, "middle", 2), (torch.float32, "minimum", 1)]


def _layer(offsets_dtype=torch.float16, offsets_at="middle", act_order=False):
    grid = {"offsets_dtype": offsets_dtype, "offsets_at": offsets_at}
    return quant_layer(in_features=K, out_features=N, act_order=act_order, **grid)


def _sharded(layer):
    return ShardedQuantLinear.from_packed(layer.packed, layer.bias)


@pytest.mark.parametrize(("offsets_dtype", "offsets_at", "words"), STORED, ids=str)
@pytest.mark.parametrize(
    ("adapt", "act_order"), [("zeros", True), ("scales", False), ("both", True), (None, False)]
)
def test_outputs_and_gradients_are_the_same_bits(
    offsets_dtype, offsets_at, words, adapt, act_order
):
    plain = _layer(offsets_dtype, offsets_at, act_order)
    other = _sharded(copy.deepcopy(plain))
    assert not dict(other.named_buffers())
    for name in ("qweight", "scales", "offsets"):
        wanted = getattr(plain, name)
        assert torch.equal(getattr(other, name), wanted)
        assert torch.equal(getattr(other.packed, name), wanted)
    assert other.grid.dtype == torch.int32
    assert other.grid.shape == (plain.spec.num_groups, words * N)
    results = []
    for layer in (plain, other):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(3, 5, K, generator=generator, requires_grad=True)
        a = torch.randn(R, plain.spec.num_groups, generator=generator, requires_grad=True)
        b = torch.randn(N, R, generator=generator, requires_grad=True)
        change = LowRank(a, b, 0.01)
        y = layer(
            x,
            zeros=change if adapt in ("zeros", "both") else None,
            scale=change if adapt in ("scales", "both") else None,
        )
        y.square().sum().backward()
        results.append((y, x.grad, a.grad, b.grad))
    for one, two in zip(*results, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_the_backward_unpacks_the_grid_again(monkeypatch):
    """Otherwise every layer would keep fp32 copies of what is sharded until its backward."""
    calls = []

    def counted(grid, spec):
        calls.append(grid)
        return unpack_grid(grid, spec)

    monkeypatch.setattr(sharded, "unpack_grid", counted)
    layer = _sharded(_layer())
    x = torch.randn(5, K, requires_grad=True)
    a, b = torch.randn(R, 3, requires_grad=True), torch.randn(N, R, requires_grad=True)
    y = layer(x, zeros=LowRank(a, b, 0.01))
    before = len(calls)
    y.sum().backward()
    assert len(calls) == before + 2


def test_casting_the_model_leaves_the_grid_alone():
    layer = _sharded(_layer(act_order=True))
    before = layer.grid.clone(), layer.scales
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.grid, before[0])
    assert torch.equal(layer.scales, before[1])


def test_an_empty_layer_has_the_parameters_of_a_loaded_one():
    """Ranks that FSDP sends their part make the layer without numbers; the shards have to match."""
    loaded = _sharded(_layer(act_order=True))
    empty = ShardedQuantLinear(loaded.spec, bias=True, desc_act=True, device="meta")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (loaded, empty)]
    assert shapes[0] == shapes[1] and "g_idx" in shapes[0]
