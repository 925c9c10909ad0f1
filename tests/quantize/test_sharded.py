"""`ShardedQuantLinear` computes what `QuantLinear` does, from what DeepSpeed and FSDP can shard."""

import copy

import pytest
import torch

from qalora_kernels import LowRank, QuantSpec
from qalora_plugin.layers import sharded
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharded import ShardedQuantLinear, pack_grid, unpack_grid

K, N, R = 80, 24, 4


def _layer(offsets_dtype: torch.dtype, desc_act: bool, offsets_at: str = "middle") -> QuantLinear:
    spec = QuantSpec(4, 32, K, N, offsets_dtype=offsets_dtype, offsets_at=offsets_at)
    generator = torch.Generator().manual_seed(1)
    groups = spec.num_groups
    return QuantLinear.from_codes(
        spec,
        torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8),
        torch.rand(groups, N, generator=generator) * 0.1 + 0.01,
        torch.randn(groups, N, generator=generator) * 0.05,
        g_idx=torch.randperm(K, generator=generator) // 32 if desc_act else None,
        bias=torch.randn(N, generator=generator),
    )


@pytest.mark.parametrize(
    ("offsets_dtype", "offsets_at"),
    [(torch.float16, "middle"), (torch.float32, "middle"), (torch.float32, "minimum")],
    ids=str,
)
@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("adapt", ["zeros", "scales", "both", None])
def test_outputs_and_gradients_are_the_same_bits(
    offsets_dtype: torch.dtype, offsets_at: str, desc_act: bool, adapt: str | None
) -> None:
    plain = _layer(offsets_dtype, desc_act, offsets_at)
    other = ShardedQuantLinear.of(copy.deepcopy(plain))
    assert not dict(other.named_buffers())
    assert torch.equal(other.scales, plain.scales)
    assert torch.equal(other.offsets, plain.offsets)
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


def test_the_backward_unpacks_the_grid_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every layer would keep fp32 copies of what is sharded until its backward."""
    calls = []

    def counted(grid: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(grid)
        return unpack_grid(grid, spec)

    monkeypatch.setattr(sharded, "unpack_grid", counted)
    layer = ShardedQuantLinear.of(_layer(torch.float16, False))
    x = torch.randn(5, K, requires_grad=True)
    a, b = torch.randn(R, 3, requires_grad=True), torch.randn(N, R, requires_grad=True)
    y = layer(x, zeros=LowRank(a, b, 0.01))
    before = len(calls)
    y.sum().backward()
    assert len(calls) == before + 2


def test_casting_the_model_leaves_the_grid_alone() -> None:
    layer = ShardedQuantLinear.of(_layer(torch.float16, True))
    before = layer.grid.clone(), layer.scales
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.grid, before[0])
    assert torch.equal(layer.scales, before[1])


@pytest.mark.parametrize(
    ("dtype", "offsets_at", "words"),
    [(torch.float16, "middle", 1), (torch.float32, "middle", 2), (torch.float32, "minimum", 1)],
    ids=str,
)
def test_grid_has_the_stored_size(dtype: torch.dtype, offsets_at: str, words: int) -> None:
    layer = _layer(dtype, False, offsets_at)
    grid = pack_grid(layer.scales, layer.offsets, layer.spec)
    assert grid.dtype == torch.int32
    assert grid.shape == (layer.spec.num_groups, words * N)
    scales, offsets = unpack_grid(grid, layer.spec)
    assert torch.equal(scales, layer.scales)
    assert torch.equal(offsets, layer.offsets)


def test_an_empty_layer_has_the_parameters_of_a_loaded_one() -> None:
    """Ranks that FSDP sends their part make the layer without numbers; the shards have to match."""
    loaded = ShardedQuantLinear.of(_layer(torch.float16, desc_act=True))
    empty = ShardedQuantLinear(loaded.spec, bias=True, desc_act=True, device="meta")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (loaded, empty)]
    assert shapes[0] == shapes[1] and "g_idx" in shapes[0]
