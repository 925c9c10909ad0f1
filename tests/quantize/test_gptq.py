"""The solver: against brute force and the paper's algorithm, orderings, refit, odd shapes."""

import pytest
import torch

from qalora_kernels import QuantSpec
from qalora_plugin.errors import ConfigError, QuantizationError
from qalora_plugin.quantize import gptq as module
from qalora_plugin.quantize.gptq import GPTQSettings, Hessian, calibrated_error, gptq
from qalora_plugin.quantize.grid import Grid
from qalora_plugin.quantize.rtn import rtn


def _spec(weight, bits, group_size, zeros="real"):
    dtype = torch.float32 if zeros == "integer" else torch.float16
    return QuantSpec(bits, group_size, weight.shape[1], weight.shape[0], offsets_dtype=dtype)


def _solve(weight, hessian, bits, group_size, zeros="real", name="weight", **settings):
    spec = _spec(weight, bits, group_size, zeros)
    settings = GPTQSettings(**settings)
    return gptq(weight, hessian, spec, zero_points=zeros, settings=settings, name=name)


def _problem(n=24, k=172, tokens=1500, seed=0):
    """A weight and inputs of which some are large and all are correlated."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.05
    mixing = torch.randn(k, k, generator=generator) / k**0.5 + 0.3 * torch.eye(k)
    sizes = torch.rand(k, generator=generator) * 3
    hessian = Hessian(k)
    hessian.add(torch.randn(tokens, k, generator=generator) @ mixing * sizes)
    return weight, hessian.mean("x")


def test_hessian_is_the_mean_of_outer_products():
    x = torch.randn(6, 5, 4)
    hessian = Hessian(4)
    for part in x:
        hessian.add(part)
    flat = x.reshape(-1, 4).double()
    assert torch.allclose(hessian.mean("x").double(), flat.t() @ flat / 30, atol=1e-6)


@pytest.mark.parametrize(
    "bits, zeros, ordering",
    [
        (2, "integer", "act"),
        (2, "none", "groups"),
        (3, "real", "act"),
        (4, "integer", "none"),
        (4, "none", "act"),
        (4, "real", "groups"),
        (8, "integer", "groups"),
        (8, "none", "none"),
        (8, "real", "none"),
    ],
)
def test_less_error_than_rounding_to_nearest(bits, zeros, ordering):
    weight, hessian = _problem()
    nearest = rtn(weight, _spec(weight, bits, 32, zeros), name="w", zero_points=zeros)
    solved = _solve(weight, hessian, bits, 32, zeros, ordering=ordering)
    assert calibrated_error(weight, solved, hessian) < 0.8 * calibrated_error(
        weight, nearest, hessian
    )
    assert int(solved.codes().max()) < 1 << bits
    assert torch.equal(solved.scales.half().float(), solved.scales)
    if zeros == "none":
        assert not solved.offsets.any()
    elif zeros == "integer":
        points = (1 << (bits - 1)) - solved.offsets.double() / solved.scales.double()
        assert torch.equal(points, points.round())
        assert points.min() >= 1 and points.max() < 1 << bits
    else:
        assert torch.equal(solved.offsets.half().float(), solved.offsets)


def _paper(w, hessian, scale, offset, bits, damp):
    """Algorithm 1 of arXiv 2210.17323 as it stands, with a fixed grid: W [N, K] in float64."""
    k = w.shape[1]
    h = hessian.double() + damp * hessian.diagonal().double().mean() * torch.eye(k)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w, out = w.double().clone(), torch.empty_like(w, dtype=torch.float64)
    mid = 1 << (bits - 1)
    for i in range(k):
        codes = ((w[:, i] - offset) / scale).round().clamp(-mid, mid - 1)
        out[:, i] = codes * scale + offset
        error = (w[:, i] - out[:, i]) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
    return out


def test_same_integers_as_the_paper(monkeypatch):
    weight, hessian = _problem(n=16, k=60)
    scale, offset = torch.full((16,), 0.03125), torch.zeros(16)
    monkeypatch.setattr(module, "fit_groups", lambda *args: (scale, offset))
    ours = _solve(weight, hessian, 3, 60, ordering="none", sweeps=0, damp=0.02).dequantize().t()
    theirs = _paper(weight, hessian, scale.double(), offset.double(), 3, damp=0.02)
    # fp32 against float64: a value near the middle between two codes may fall to either side
    assert (ours.double() == theirs).double().mean() > 0.99


def test_close_to_brute_force_on_a_tiny_problem():
    ratios = []
    codes = torch.cartesian_prod(*[torch.arange(-2, 2.0, dtype=torch.float64)] * 5)  # [1024, 5]
    basis = torch.stack([codes, torch.ones_like(codes)], -1)
    for seed in range(8):
        weight, hessian = _problem(n=1, k=5, seed=seed)
        h, w = hessian.double(), weight[0].double()
        normal, target = basis.mT @ h @ basis, (basis.mT @ h @ w).unsqueeze(-1)
        solution = torch.linalg.lstsq(normal, target, driver="gelsd").solution
        e = w - (basis @ solution).squeeze(-1)
        errors = ((e @ h) * e).sum(-1)[solution[:, 0, 0] > 0]
        e = w - _solve(weight, hessian, 2, 5).dequantize().t()[0].double()
        ratios.append(((e @ h @ e) / errors.min()).item())
    assert min(ratios) > 0.99
    assert sorted(ratios)[4] < 3  # the median; rounding one input after another is greedy


@pytest.mark.parametrize("bits, zeros", [(2, "integer"), (2, "none"), (4, "real")])
def test_every_sweep_lowers_the_error(bits, zeros):
    weight, hessian = _problem()
    solved = [_solve(weight, hessian, bits, 32, zeros, sweeps=sweeps) for sweeps in range(4)]
    errors = [calibrated_error(weight, found, hessian) for found in solved]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] <= errors[1] and errors[3] <= errors[2]


@pytest.mark.parametrize("zeros", ["real", "integer", "none"])
def test_refit_is_the_least_squares_solution(zeros):
    """Closed form against a general solver, before rounding to fp16 matters."""
    weight, hessian = _problem(n=3, k=40)
    # after so many sweeps codes have settled: the last refit is the optimum
    solved = _solve(weight, hessian, 3, 40, zeros, sweeps=30)
    h = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(40)
    root = torch.linalg.cholesky(h).t()
    for n in range(3):
        codes = solved.codes()[n].double() - 4
        columns = [codes, torch.ones(40, dtype=torch.float64)]
        if zeros != "real":
            columns = [codes + (solved.offsets[0, n] / solved.scales[0, n]).double()]
        basis = root @ torch.stack(columns, 1)
        best = torch.linalg.lstsq(basis, root @ weight[n, :, None].double()).solution.flatten()
        assert solved.scales[0, n].item() == pytest.approx(best[0].item(), rel=2e-3)
        if zeros == "real":
            assert solved.offsets[0, n].item() == pytest.approx(best[1].item(), rel=2e-3, abs=1e-5)


def test_act_order_scatters_groups_by_size_of_input():
    weight, hessian = _problem(k=100)
    solved = _solve(weight, hessian, 4, 32, ordering="act")
    assert solved.g_idx.dtype == torch.int32
    assert solved.g_idx.bincount().tolist() == [32, 32, 32, 4]
    order = torch.argsort(hessian.diagonal(), descending=True)
    assert solved.g_idx[order].tolist() == sorted(solved.g_idx.tolist())


def test_groups_stay_contiguous_without_act_order():
    weight, hessian = _problem(k=100)
    for ordering in ("none", "groups"):
        solved = _solve(weight, hessian, 8, 32, ordering=ordering)
        assert solved.g_idx is None
        # were a scale in another group's place, 8 bits could not be this close
        assert (solved.dequantize().t() - weight).abs().max() < 0.02 * weight.abs().max()


@pytest.mark.parametrize(
    "k, group_size, ordering",
    [
        (172, 32, "groups"),
        (300, 300, "act"),
        (300, 200, "groups"),
        (300, 200, "none"),
        (7, 3, "act"),
        (9, 1, "groups"),
        (5, 8, "act"),
    ],
)
def test_odd_shapes(k, group_size, ordering):
    weight, hessian = _problem(n=6, k=k, tokens=600)
    solved = _solve(weight, hessian, 4, group_size, ordering=ordering)
    groups = -(-k // group_size)
    assert solved.codes().shape == (6, k)
    assert solved.scales.shape == solved.offsets.shape == (groups, 6)
    assert calibrated_error(weight, solved, hessian) < 0.05


def test_blocks_do_not_change_the_result(monkeypatch):
    weight, hessian = _problem(k=160)
    one = _solve(weight, hessian, 4, 16, sweeps=0)
    monkeypatch.setattr(module, "_BLOCK", 1000)
    other = _solve(weight, hessian, 4, 16, sweeps=0)
    assert (one.codes() == other.codes()).float().mean() > 0.99  # sums in another order


def test_dead_inputs_keep_their_weights():
    weight, hessian = _problem(k=64)
    hessian[:, 10:20] = 0
    hessian[10:20] = 0
    solved = _solve(weight, hessian, 8, 32)
    # clipped where that helps the others, but not set to zero
    assert (solved.dequantize().t() - weight)[:, 10:20].abs().max() < 0.05 * weight.abs().max()


def test_a_singular_hessian_is_damped():
    weight, _ = _problem(k=64)
    hessian = Hessian(64)
    hessian.add(torch.randn(3, 64) * 1e3)
    solved = _solve(weight, hessian.mean("x"), 4, 32)
    assert solved.dequantize().t().isfinite().all()


def test_no_tokens_means_plain_rounding(caplog):
    weight, _ = _problem(k=64)
    hessian = Hessian(64).mean("experts.3")
    assert "experts.3" in caplog.text
    solved = _solve(weight, hessian, 4, 32, ordering="act")
    nearest = rtn(weight, _spec(weight, 4, 32), name="w")
    error = (solved.dequantize().t() - weight).square().sum()
    assert error < 1.05 * (nearest.dequantize().t() - weight).square().sum()


def test_bad_input_names_the_layer():
    weight, hessian = _problem(k=64)
    damaged = weight.clone()
    damaged[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers\.1\.up.*NaN"):
        _solve(damaged, hessian, 4, 32, name="layers.1.up")
    accumulated = Hessian(4)
    accumulated.add(torch.full((2, 4), float("inf")))
    with pytest.raises(QuantizationError, match=r"layers\.1\.up.*calibration inputs"):
        accumulated.mean("layers.1.up")
    with pytest.raises(QuantizationError, match=r"layers\.1\.up.*cannot be factored"):
        _solve(weight, -torch.eye(64) * 1e9, 4, 32, name="layers.1.up")


@pytest.mark.parametrize(
    "bad", [{"ordering": "size"}, {"damp": 0.0}, {"damp": 2.0}, {"sweeps": -1}]
)
def test_bad_settings(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GPTQSettings(**bad)


def test_deterministic():
    weight, hessian = _problem()
    runs = [_solve(weight, hessian, 3, 32) for _ in range(2)]
    for field in ("qweight", "scales", "offsets"):
        assert torch.equal(getattr(runs[0], field), getattr(runs[1], field))


def test_inputs_are_left_alone():
    weight, hessian = _problem(k=64)
    before = weight.clone(), hessian.clone()
    _solve(weight, hessian, 4, 32)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_grid_constants():
    assert (Grid(3).mid, Grid(3).top) == (4, 7)


def test_a_layer_of_zeros_has_no_relative_error():
    weight, hessian = torch.zeros(8, 32), torch.eye(32)
    solved = _solve(weight, hessian, 4, 16)
    assert torch.equal(solved.dequantize().t(), weight)
    assert calibrated_error(weight, solved, hessian) is None
