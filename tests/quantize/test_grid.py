"""The grid: fits, integer and symmetric zero-points, and groups that have no range."""

import pytest
import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_plugin.errors import QuantizationError
from qalora_plugin.quantize.grid import (
    MIN_SCALE,
    Grid,
    check_weight,
    fit_groups,
    fit_range,
    round_codes,
)
from qalora_plugin.quantize.rtn import rtn

BITS = (2, 3, 4, 8)
KINDS = {
    "real": {},
    "integer": {"offsets_dtype": torch.float32},
    "minimum": {"offsets_dtype": torch.float32, "offsets_at": "minimum"},
}


def _rtn(w, bits, group_size, kind="real", **kwargs):
    spec = QuantSpec(bits, group_size, w.shape[1], w.shape[0], **KINDS[kind])
    return rtn(w, spec, name="w", zero_points="integer" if kind == "integer" else "real", **kwargs)


def _error(w, scales, offsets, grid, importance):
    codes = round_codes(w, scales.unsqueeze(-2), offsets.unsqueeze(-2), grid)
    return (importance * (codes * scales.unsqueeze(-2) + offsets.unsqueeze(-2) - w) ** 2).sum(-2)


def _in_fp16(values):
    return torch.equal(values.half().float(), values)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_points", ["real", "integer", "none"])
def test_search_is_never_worse_than_the_range_and_stays_on_the_grid(bits, zero_points):
    torch.manual_seed(0)
    w = torch.randn(5, 32, 24) * 0.05
    w[0, 3] *= 20  # an outlier that clipping pays for
    importance = torch.rand(5, 32, 1) + 0.1
    grid = Grid(bits, zero_points)
    plain, searched = fit_range(w, grid), fit_groups(w, grid, importance)
    before, after = _error(w, *plain, grid, importance), _error(w, *searched, grid, importance)
    assert (after <= before).all()
    # clipping both ends of a symmetric range pays little at 8 bits
    assert after.sum() < before.sum() * (1 if (bits, zero_points) == (8, "none") else 0.99)
    scales, offsets = searched
    assert _in_fp16(scales) and (scales > 0).all()
    if zero_points == "none":
        assert not offsets.any()
    elif zero_points == "integer":
        zeros = grid.mid - offsets.double() / scales.double()
        assert torch.equal(zeros, zeros.round())
        assert zeros.min() >= 1 and zeros.max() <= grid.top
    else:
        assert _in_fp16(offsets)


@pytest.mark.parametrize("bits", BITS)
def test_minima_are_fp16_numbers_at_no_cost(bits):
    torch.manual_seed(0)
    w = torch.randn(9, 172) * 0.05 + 0.02
    fits = [_rtn(w, bits, 32, kind) for kind in ("real", "minimum")]
    middle, minimum = (fit.dequantize().t() for fit in fits)
    scales, offsets = fits[1].scales.double(), fits[1].offsets.double()
    minima = offsets - (1 << (bits - 1)) * scales
    assert torch.equal(minima.half().double(), minima) and _in_fp16(fits[1].scales)
    assert not torch.equal(middle, minimum)
    # at 8 bits the step is about that of fp16 itself
    assert (minimum - w).norm() <= (middle - w).norm() * (1.01 if bits < 8 else 1.1)


def test_search_comes_close_to_brute_force():
    torch.manual_seed(1)
    grid = Grid(2)
    w = torch.randn(6, 1)
    codes = torch.cartesian_prod(*[torch.arange(-2, 2.0, dtype=torch.float64)] * 6)  # [4096, 6]
    basis = torch.stack([codes, torch.ones_like(codes)], -1)
    target = w.double().expand(len(codes), 6, 1)
    solution = torch.linalg.lstsq(basis, target, driver="gelsd").solution
    errors = (basis @ solution - target).square().sum((1, 2))
    best = errors[solution[:, 0, 0] > 0].min().item()
    ours = _error(w, *fit_groups(w, grid, torch.ones(6, 1)), grid, torch.ones(6, 1)).item()
    assert best <= ours * (1 + 1e-3)
    assert ours <= 1.3 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-9, -1e-6, 3e4, -6e4])
def test_constant_groups(value, kind):
    w = torch.full((4, 40), value)
    weight = _rtn(w, 4, 16, kind)
    out = weight.dequantize().t()
    assert out.isfinite().all() and (weight.scales >= MIN_SCALE).all()
    assert (out - w).abs().max() <= max(abs(value) * 2**-11, 2 * MIN_SCALE)


@pytest.mark.parametrize("kind", ["real", "minimum"])
def test_range_beyond_fp16_is_clipped_not_infinite(kind):
    w = torch.tensor([[60000.0, -60000.0, 0.0, 1.0]])
    weight = _rtn(w, 2, 4, kind)
    assert weight.scales.isfinite().all() and weight.offsets.isfinite().all()
    assert (weight.dequantize().t() - w).abs().max() <= 40000


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e5])
def test_weights_that_no_grid_holds(bad):
    w = torch.zeros(3, 8)
    w[1, 2] = bad
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.q_proj"):
        check_weight(w, "model.layers.0.q_proj")


def test_integer_zero_points_need_offsets_that_hold_them():
    with pytest.raises(ValueError, match="integer zero-points need fp32 offsets"):
        Grid.of(QuantSpec(4, 8, 8, 8), "integer")


@pytest.mark.parametrize(
    "bits, k, group_size", [(2, 172, 32), (3, 7, 3), (4, 5, 5), (8, 64, 64), (4, 33, 1), (3, 5, 8)]
)
def test_rtn_error_is_within_a_step(bits, k, group_size):
    torch.manual_seed(bits)
    w = torch.randn(9, k) * 0.02
    weight = _rtn(w, bits, group_size, search=False)
    assert weight.codes().shape == (9, k) and int(weight.codes().max()) < 1 << bits
    groups = -(-k // group_size)
    assert weight.scales.shape == weight.offsets.shape == (groups, 9)
    step = weight.scales.repeat_interleave(group_size, 0)[:k].t()
    # half a step, and what the rounding of scale and offset to fp16 adds
    assert ((weight.dequantize().t() - w).abs() <= 0.51 * step + 2**-10 * w.abs().max()).all()


def test_rtn_in_chunks_of_outputs_is_the_same(monkeypatch):
    torch.manual_seed(0)
    w = torch.randn(50, 40)
    whole = _rtn(w, 3, 16)
    monkeypatch.setattr("qalora_plugin.quantize.rtn._CHUNK", 48 * 7)
    parts = _rtn(w, 3, 16)
    for field in ("qweight", "scales", "offsets"):
        assert torch.equal(getattr(whole, field), getattr(parts, field))


def test_a_packed_weight_follows_g_idx():
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scales, offsets = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.5], [0.0]])
    g_idx = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    weight = PackedWeight.from_codes(codes, scales, offsets, g_idx, QuantSpec(2, 2, 4, 1))
    assert weight.dequantize().t().tolist() == [[-20.0, -0.5, 0.5, 10.0]]
