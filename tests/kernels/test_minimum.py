"""`offsets_at` "minimum": the weight at code 0 is the number that fp16 holds."""

import pytest
import torch

from qalora_kernels import (
    LowRank,
    PackedWeight,
    QuantSpec,
    load_offsets,
    round_minimum,
    store_offsets,
)


def test_folding_rounds_the_minimum_once(bits, randn):
    spec = QuantSpec(bits, 32, 172, 37, offsets_dtype=torch.float32, offsets_at="minimum")
    scales = (randn(6, 37).abs() * 0.1 / (1 << bits) + 0.01).half().float()
    scales[:, 1::2] *= -1
    offsets = round_minimum(randn(6, 37, scale=0.05), scales, spec.mid, torch.float16)
    weight = PackedWeight(torch.empty(0), scales, offsets, None, spec)
    part = LowRank(randn(4, 6, scale=0.1), randn(37, 4, scale=0.1), 0.5)
    for zeros, scale in ((part, None), (None, part), (part, part)):
        folded = weight.fold(zeros, scale)
        wanted_scales, wanted = scales.double(), offsets.double()
        if scale is not None:
            zero_point = wanted / wanted_scales
            wanted_scales = (wanted_scales * (1 + scale.delta())).half().double()
            wanted = wanted_scales * zero_point
        if zeros is not None:
            wanted = wanted + zeros.delta()
        minima = (wanted - spec.mid * wanted_scales).half()
        assert torch.equal(folded.scales.double(), wanted_scales)
        assert torch.equal(folded.offsets.double(), minima.double() + spec.mid * wanted_scales)
        assert not torch.equal(folded.offsets, offsets)


def any_grid(seed):
    """Scales and minima [200000], fp32 that fp16 holds: every pair of exponents, subnormal too."""
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        exponents = torch.randint(-24, 15, (200_000,), generator=generator)
        values = torch.ldexp(1 + torch.rand(200_000, generator=generator), exponents)
        signs = torch.randn(200_000, generator=generator).sign()
        return values.half().float() * signs

    scales, minima = numbers(), numbers()
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
    assert (inexact <= (2 * steps * scales.abs() <= 2.0**-12 * once.abs())).all()
    assert inexact.any()
    size = scales.abs()
    near = (minima.abs() < 2.0**12 * size) & (size < 2.0**12 * minima.abs())
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
    assert (minima.abs() < 2.0**-12 * spec.mid * scales.abs())[changed].all()
    # by at most half a unit of fp32 at the offset
    assert ((stored - minima).abs() <= 2.0**-24 * 2 * spec.mid * scales.abs()).all()
    again = load_offsets(stored, scales.half(), spec)
    assert torch.equal(again, loaded)
    assert_same_bits(store_offsets(again, scales.half(), spec), stored)


def test_offsets_in_the_middle_are_stored_as_they_are():
    spec = grid_spec(4, "middle")
    scales, offsets = any_grid(4)
    stored = store_offsets(offsets, scales, spec)
    assert_same_bits(stored, offsets.half())
    assert load_offsets(stored, scales, spec) is stored
