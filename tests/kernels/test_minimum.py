"""`offsets_at` "minimum": the weight at code 0 is the number that fp16 holds."""

import dataclasses

import pytest
import torch

from qalora_kernels import (
    LowRank,
    QuantSpec,
    fold,
    folded_linear,
    load_offsets,
    quantized_linear,
    round_minimum,
    store_offsets,
)

MODES = ("zeros", "scales", "both")


def at_minimum(layer):
    """The layer on the grid of minima."""
    spec = dataclasses.replace(layer.spec, offsets_dtype=torch.float32, offsets_at="minimum")
    offsets = round_minimum(layer.offsets, layer.scales, spec.mid, torch.float16)
    return dataclasses.replace(layer, spec=spec, offsets=offsets)


def changes(spec, randn, mode):
    """(zeros, scale) as leaves that ask for gradients."""

    def part(rank):
        a = randn(rank, spec.num_groups, scale=0.1).requires_grad_()
        b = randn(spec.out_features, rank, scale=0.1).requires_grad_()
        return LowRank(a, b, 0.5)

    return (
        part(4) if mode in ("zeros", "both") else None,
        part(5) if mode in ("scales", "both") else None,
    )


def delta(part):
    return None if part is None else part.delta()


def fold_layer(layer, zeros, scale):
    spec = layer.spec
    return fold(
        layer.scales,
        layer.offsets,
        zeros=delta(zeros),
        scale=delta(scale),
        offsets_dtype=spec.offsets_dtype,
        minimum_below=spec.minimum_below,
    )


@pytest.mark.parametrize("mode", MODES)
def test_folding_rounds_the_minimum_once(bits, mode, make_layer, randn):
    layer = at_minimum(make_layer(bits))
    zeros, scale = changes(layer.spec, randn, mode)
    scales, offsets = fold_layer(layer, zeros, scale)
    wanted_scales, wanted = layer.scales.double(), layer.offsets.double()
    if scale is not None:
        zero_point = wanted / wanted_scales
        wanted_scales = (wanted_scales * (1 + scale.delta())).half().double()
        wanted = wanted_scales * zero_point
    if zeros is not None:
        wanted = wanted + zeros.delta()
    minima = (wanted - layer.spec.mid * wanted_scales).half()
    assert torch.equal(scales.double(), wanted_scales)
    assert torch.equal(offsets.double(), minima.double() + layer.spec.mid * wanted_scales)
    assert not torch.equal(offsets, layer.offsets)


@pytest.mark.parametrize("mode", MODES)
def test_merged_equals_unmerged(backend, bits, mode, make_layer, randn):
    layer = at_minimum(make_layer(bits))
    zeros, scale = changes(layer.spec, randn, mode)
    x = randn(7, layer.spec.in_features)
    folded = folded_linear(x, *layer.tensors, None, spec=layer.spec, zeros=zeros, scale=scale)
    new = fold_layer(layer, zeros, scale)
    merged = quantized_linear(x, layer.qweight, *new, layer.g_idx, None, spec=layer.spec)
    assert torch.equal(folded, merged)


def test_gradients_are_those_of_offsets_in_the_middle(backend, bits, make_layer, randn):
    """Rounding is passed straight through, whichever weight is rounded."""
    layer = at_minimum(make_layer(bits))
    x, dy = randn(7, layer.spec.in_features), randn(7, layer.spec.out_features)
    middle = dataclasses.replace(layer.spec, offsets_at="middle")
    found = []
    for spec in (layer.spec, middle):
        zeros, scale = changes(spec, randn, "both")
        y = folded_linear(x, *layer.tensors, None, spec=spec, zeros=zeros, scale=scale)
        found.append(torch.autograd.grad(y, (zeros.a, zeros.b, scale.a, scale.b), dy))
    for ours, theirs in zip(*found, strict=True):
        assert ours.any() and torch.equal(ours, theirs)


def any_grid(seed):
    """Scales and minima [200000], fp32 that fp16 holds: every pair of exponents, subnormal too."""
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        exponents = torch.randint(-24, 15, (200_000,), generator=generator)
        values = torch.ldexp(1 + torch.rand(200_000, generator=generator), exponents)
        return values.half().float()

    scales, minima = numbers(), numbers() * torch.randn(200_000, generator=generator).sign()
    minima[::7] = 0
    return scales, minima


@pytest.mark.parametrize("steps", [2, 4, 8, 128])
def test_rounding_again_changes_nothing_whatever_the_exponents(steps):
    scales, minima = any_grid(steps)
    offsets = (minima.double() + steps * scales.double()).float()
    once = round_minimum(offsets, scales, steps, torch.float16)
    assert torch.equal(round_minimum(once, scales, steps, torch.float16), once)
    inexact = (once.double() - steps * scales.double()).half().double() != (
        once.double() - steps * scales.double()
    )
    # only where all weights of a group are the same to 2^-12 of themselves
    assert (inexact <= (2 * steps * scales <= 2.0**-12 * once.abs())).all()
    assert inexact.any()
    near = (minima.abs() < 2.0**12 * scales) & (scales < 2.0**12 * minima.abs())
    assert torch.equal(once[near], offsets[near])


def grid_spec(bits, offsets_at):
    dtype = torch.float32 if offsets_at == "minimum" else torch.float16
    return QuantSpec(bits, 32, 32, 200_000, offsets_dtype=dtype, offsets_at=offsets_at)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))  # 0.0 is not -0.0


def test_what_is_stored_comes_back(bits):
    spec = grid_spec(bits, "minimum")
    scales, minima = any_grid(bits)
    # a real-valued offset, as folding rounds it
    exact = (minima + 1e-9).double() + spec.mid * scales.double()
    offsets = round_minimum(exact, scales, spec.mid, torch.float16)
    stored = store_offsets(offsets, scales, spec)
    assert stored.dtype == spec.stored_dtype == torch.float16
    loaded = load_offsets(stored, scales.half(), spec)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, offsets)
    assert_same_bits(store_offsets(loaded, scales.half(), spec), stored)


def test_minima_from_elsewhere_lose_only_what_fp32_drops_and_only_once(bits):
    spec = grid_spec(bits, "minimum")
    scales, minima = any_grid(bits)
    loaded = load_offsets(minima.half(), scales.half(), spec)
    stored = store_offsets(loaded, scales.half(), spec)
    changed = stored != minima
    assert changed.any()
    assert (minima.abs() < 2.0**-12 * spec.mid * scales)[changed].all()
    # by at most half a unit of fp32 at the offset
    assert ((stored - minima).abs() <= 2.0**-24 * 2 * spec.mid * scales).all()
    again = load_offsets(stored, scales.half(), spec)
    assert torch.equal(again, loaded)
    assert_same_bits(store_offsets(again, scales.half(), spec), stored)


def test_offsets_in_the_middle_are_stored_as_they_are(bits):
    spec = grid_spec(bits, "middle")
    scales, offsets = any_grid(bits)
    stored = store_offsets(offsets, scales, spec)
    assert_same_bits(stored, offsets.half())
    assert load_offsets(stored, scales, spec) is stored


def test_specs_that_cannot_be():
    with pytest.raises(ValueError, match="offsets_at must be one of"):
        QuantSpec(4, 32, 64, 64, offsets_at="zero")
    with pytest.raises(ValueError, match="needs offsets_dtype float32"):
        QuantSpec(4, 32, 64, 64, offsets_at="minimum")
    assert QuantSpec(4, 32, 64, 64).minimum_below is None
