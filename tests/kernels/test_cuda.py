"""What only a GPU can show: CUDA graphs, streams, sizes past 2^31, tuning, torch.compile."""

import json

import pytest
import torch

from qalora_kernels import (
    LowRank,
    PackedWeight,
    QuantSpec,
    folded_linear,
    ops,
    quantized_linear,
    reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def no_tuning(monkeypatch):
    """Tests leave the user's tuning cache alone."""
    monkeypatch.setenv("QALORA_TUNING_CACHE", "off")


@pytest.mark.parametrize("m", [1, 16, 700])  # vector, fused, library
@pytest.mark.parametrize("layout", ["short_last_group", "act_order"])
def test_a_captured_graph_replays_new_inputs(m, layout, make_weight, randn):
    weight = make_weight(4, layout)
    x = randn(m, weight.spec.in_features, dtype=HALF)

    def run():
        return quantized_linear(x, weight, None)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        y = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, run())


def test_streams_do_not_share_a_workspace(make_weight, randn):
    weight = make_weight(4)
    other = make_weight(8)
    x = randn(700, weight.spec.in_features, dtype=HALF)
    expected = [quantized_linear(x, each, None) for each in (weight, other)]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(20):
        here = quantized_linear(x, weight, None)
        with torch.cuda.stream(side):
            there = quantized_linear(x, other, None)
        torch.cuda.synchronize()
        assert torch.equal(here, expected[0])
        assert torch.equal(there, expected[1])


@pytest.mark.slow
def test_inductor_compiles_without_graph_breaks(make_weight, randn):
    weight = make_weight(4, "act_order")
    x = randn(63, weight.spec.in_features, dtype=HALF)
    a, b = randn(4, weight.spec.num_groups), randn(weight.spec.out_features, 4)

    def run(x):
        zeros = LowRank(a, b, 0.1)
        return folded_linear(x, weight, None, zeros=zeros)

    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replay
        torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """W^T of 2.3e9 elements, and x of 2.2e9; about 15 GB."""
    device = torch.device("cuda")
    k, n = 4096, 560_000
    spec = QuantSpec(2, 64, k, n)
    qweight = torch.randint(-(2**31), 2**31, (spec.packed_rows, n), device=device).int()
    scales = torch.rand(spec.num_groups, n, device=device).half()
    offsets = torch.randn(spec.num_groups, n, device=device).half()
    weight = PackedWeight(qweight, scales, offsets, None, spec)
    out = weight.dequantize(HALF)
    tail = slice(n - 300, n)
    assert torch.equal(out[:, tail], weight.columns(tail).dequantize(HALF))
    del out, weight, qweight, scales, offsets
    x = torch.randn(540_000, k, device=device, dtype=HALF)
    assert torch.equal(ops.pool(x, None, 64)[-100:], ops.pool(x[-100:].contiguous(), None, 64))


@pytest.mark.slow
def test_tuning_measures_and_keeps_what_it_found(make_weight, randn, monkeypatch, tmp_path):
    from qalora_kernels.backends.triton import tuning

    cache = tmp_path / "tuning.json"
    monkeypatch.setenv("QALORA_TUNING_CACHE", str(cache))
    monkeypatch.setattr(tuning, "_plans", {})
    weight = make_weight(4)
    exact = reference.dequantize(weight, torch.float64)
    for m in (1, 16):
        x = randn(m, weight.spec.in_features, dtype=HALF)
        y = quantized_linear(x, weight, None)
        torch.testing.assert_close(y.double(), x.double() @ exact, rtol=2e-2, atol=2e-2)
    plans = json.loads(cache.read_text())["tuned"][torch.cuda.get_device_name()]
    assert len(plans) == 2
