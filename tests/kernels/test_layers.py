"""The differentiable layers, forward and backward, against a dense float64 layer."""

import dataclasses
import itertools

import pytest
import torch

from qalora_kernels import (
    LowRank,
    folded_linear,
    grid_linear,
    ops,
    quantized_linear,
    reference,
    round_minimum,
)
from qalora_kernels.groups import expand

RANK, FACTOR = 4, 0.5
MODES = ("zeros", "scales", "both")


def low_rank(weight, randn, mode):
    """(zeros, scale) of the mode, of fp32 leaves."""
    spec = weight.spec

    def part(rank):
        a = randn(rank, spec.num_groups, scale=0.1).requires_grad_()
        b = randn(spec.out_features, rank, scale=0.1).requires_grad_()
        return LowRank(a, b, FACTOR)

    return (
        part(RANK) if mode in ("zeros", "both") else None,
        part(RANK + 1) if mode in ("scales", "both") else None,
    )


def leaves_of(*parts):
    return [t for part in parts if part for t in (part.a, part.b)]


def as_double(part):
    if part is None:
        return None
    return LowRank(part.a.detach().double(), part.b.detach().double(), FACTOR)


def dense(x, weight, zeros, scale, bias):
    """The folded layer as dense algebra in the dtype of x: the weight that folding rounds to, and
    the adapter's change added to it with value zero, so that autograd differentiates the formula.
    """
    spec, dtype = weight.spec, x.dtype
    compute = torch.promote_types(dtype, torch.float32)

    def change(part):
        if part is None:
            return 0.0
        delta = FACTOR * (part.a.to(dtype).t() @ part.b.to(dtype).t())
        return expand(delta - delta.detach(), weight.g_idx, spec.group_size, spec.in_features)

    base, folded = (
        reference.dequantize(w, compute).to(dtype) for w in (weight, weight.fold(zeros, scale))
    )
    weight_t = folded + change(zeros) + change(scale) * base
    y = x @ weight_t
    return y if bias is None else y + bias.to(dtype)


def gradients(output, dy, leaves):
    return torch.autograd.grad(output, leaves, dy.to(output.dtype))


def test_folded_linear(case, make_weight, randn, assert_as_good_as):
    bits, layout, dtype = case
    weight = make_weight(bits, layout)
    for mode in MODES:
        zeros, scale = low_rank(weight, randn, mode)
        x = randn(63, weight.spec.in_features, dtype=dtype).requires_grad_()
        dy = randn(63, weight.spec.out_features, dtype=dtype)
        bias = randn(weight.spec.out_features, dtype=dtype).requires_grad_()
        ours = folded_linear(x, weight, bias, zeros=zeros, scale=scale)
        plain = dense(x, weight, zeros, scale, bias)
        exact = dense(x.double(), weight, zeros, scale, bias.double())
        assert ours.dtype == dtype
        assert_as_good_as(ours.detach(), plain.detach(), exact.detach())

        # fp64 leaves of their own: the cast of a leaf would round the exact gradient
        wide_parts = as_double(zeros), as_double(scale)
        wide = [x.detach().double(), bias.detach().double(), *leaves_of(*wide_parts)]
        for leaf in wide:
            leaf.requires_grad_()
        exact = dense(wide[0], weight, *wide_parts, wide[1])
        leaves = [x, bias, *leaves_of(zeros, scale)]
        for mine, other, truth in zip(
            gradients(ours, dy, leaves),
            gradients(plain, dy, leaves),
            gradients(exact, dy, wide),
            strict=True,
        ):
            assert_as_good_as(mine, other, truth)


def at_minimum(weight):
    """The weight on the grid of minima."""
    spec = dataclasses.replace(weight.spec, offsets_dtype=torch.float32, offsets_at="minimum")
    offsets = round_minimum(weight.offsets, weight.scales, spec.mid, torch.float16)
    return dataclasses.replace(weight, spec=spec, offsets=offsets)


def test_a_merged_layer_gives_the_same_bits_as_the_folded_one(backend, layouts, make_weight, randn):
    for (bits, layout), mode in zip(layouts, itertools.cycle(MODES), strict=False):
        middle = make_weight(bits, layout)
        for weight in (middle, at_minimum(middle)):
            x = randn(7, weight.spec.in_features, dtype=torch.float16)
            zeros, scale = low_rank(weight, randn, mode)
            folded = folded_linear(x, weight, None, zeros=zeros, scale=scale)
            merged = weight.fold(zeros, scale)
            assert torch.equal(folded, quantized_linear(x, merged, None)), (weight.spec, mode)
            with torch.no_grad():  # evaluation takes another way
                again = folded_linear(x, weight, None, zeros=zeros, scale=scale)
                assert torch.equal(folded, again)
                assert torch.equal(folded, quantized_linear(x, merged, None))


def test_gradients_of_minima_are_those_of_offsets_in_the_middle(backend, make_weight, randn):
    """Rounding is passed straight through, whichever weight is rounded."""
    weight = at_minimum(make_weight(3))
    x, dy = randn(7, weight.spec.in_features), randn(7, weight.spec.out_features)
    middle = dataclasses.replace(weight.spec, offsets_at="middle")
    found = []
    for spec in (weight.spec, middle):
        zeros, scale = low_rank(weight, randn, "both")
        same = dataclasses.replace(weight, spec=spec)
        y = folded_linear(x, same, None, zeros=zeros, scale=scale)
        found.append(gradients(y, dy, leaves_of(zeros, scale)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.any() and torch.equal(ours, theirs)


def test_quantized_linear_gradients(backend, make_weight, randn, assert_as_good_as):
    weight = make_weight(4)
    spec = weight.spec
    x = randn(2, 3, spec.in_features, dtype=torch.float16).requires_grad_()
    bias = randn(spec.out_features, dtype=torch.float16).requires_grad_()
    dy = randn(2, 3, spec.out_features, dtype=torch.float16)
    ours = quantized_linear(x, weight, bias)
    assert ours.shape == (2, 3, spec.out_features)
    wide, wide_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    exact = wide @ reference.dequantize(weight, torch.float64) + wide_bias
    plain = x @ reference.dequantize(weight, torch.float32).half() + bias
    for mine, other, truth in zip(
        gradients(ours, dy, (x, bias)),
        gradients(plain, dy, (x, bias)),
        gradients(exact, dy, (wide, wide_bias)),
        strict=True,
    ):
        assert_as_good_as(mine, other, truth)


def test_grid_linear(case, make_weight, randn, assert_as_good_as):
    """Scales and offsets trained themselves."""
    bits, layout, dtype = case
    weight = make_weight(bits, layout)
    spec = weight.spec
    x = randn(63, spec.in_features, dtype=dtype).requires_grad_()
    dy = randn(63, spec.out_features, dtype=dtype)
    bias = randn(spec.out_features, dtype=dtype).requires_grad_()

    def plain(x, scales, offsets, bias):
        parts = (
            expand(t, weight.g_idx, spec.group_size, spec.in_features) for t in (scales, offsets)
        )
        ones = dataclasses.replace(
            weight, scales=torch.ones_like(weight.scales), offsets=torch.zeros_like(weight.offsets)
        )
        s, o = parts
        return x @ (s * reference.dequantize(ones, s.dtype) + o).to(x.dtype) + bias

    grid = [t.clone().requires_grad_() for t in (weight.scales, weight.offsets)]
    leaves = [x, *grid, bias]
    ours = grid_linear(x, weight, *grid, bias)
    with torch.no_grad():
        assert torch.equal(ours, quantized_linear(x, weight, bias))
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for mine, other, truth in zip(
        gradients(ours, dy, leaves),
        gradients(plain(*leaves), dy, leaves),
        gradients(plain(*wide), dy, wide),
        strict=True,
    ):
        assert_as_good_as(mine, other, truth)


def test_only_what_asks_for_a_gradient_costs_one(make_weight, randn, monkeypatch):
    """Without gradients for A and B nothing is pooled, and nothing kept of x."""
    weight = make_weight(4)
    zeros, scale = low_rank(weight, randn, "both")
    frozen = [dataclasses.replace(p, a=p.a.detach(), b=p.b.detach()) for p in (zeros, scale)]
    x = randn(7, weight.spec.in_features).requires_grad_()
    expected = folded_linear(x, weight, None, zeros=zeros, scale=scale)
    monkeypatch.setattr(ops, "pool", lambda *_: pytest.fail("pooled"))
    saved = []
    with torch.no_grad():
        assert torch.equal(expected, folded_linear(x, weight, None, zeros=zeros, scale=scale))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = folded_linear(x, weight, None, zeros=frozen[0], scale=frozen[1])
    assert torch.equal(y, expected)
    assert all(t.data_ptr() != x.data_ptr() for t in saved)
    ones = torch.ones_like(y)
    assert torch.equal(gradients(y, ones, [x])[0], gradients(expected, ones, [x])[0])


def test_compiles_without_graph_breaks(backend, make_weight, randn):
    weight = make_weight(4, "act_order")
    for mode in ("none", "both"):
        zeros, scale = low_rank(weight, randn, mode)
        x = randn(7, weight.spec.in_features).requires_grad_()
        leaves = [x, *leaves_of(zeros, scale)]

        def step(x, zeros=zeros, scale=scale):
            return folded_linear(x, weight, None, zeros=zeros, scale=scale).square().sum()

        one = torch.ones((), device=x.device)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), step(x))
        expected, found = gradients(step(x), one, leaves), gradients(compiled(x), one, leaves)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other)


def test_operators_declare_what_they_return(backend, make_weight, randn):
    weight = make_weight(4, "act_order")
    spec, flat = weight.spec, weight.flat
    x, dy = randn(7, spec.in_features), randn(7, spec.out_features)
    samples = {
        "dequantize": (*flat, torch.float16),
        "pool": (x, weight.g_idx, spec.group_size),
        "linear": (x, *flat, None),
        "grad_input": (dy, *flat),
        "pooled_grad": (dy, randn(7, spec.num_groups)),
        "weighted_group_grad": (dy, x, *flat),
    }
    for name, arguments in samples.items():
        operator = getattr(torch.ops.qalora, name).default
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_activation_checkpointing(backend, make_weight, randn):
    weight = make_weight(4)
    dy = randn(7, weight.spec.out_features)
    for reentrant in (False, True):
        zeros, scale = low_rank(weight, randn, "both")
        x = randn(7, weight.spec.in_features).requires_grad_()
        leaves = [x, *leaves_of(zeros, scale)]

        def run(x, zeros=zeros, scale=scale):
            return folded_linear(x, weight, None, zeros=zeros, scale=scale)

        expected = gradients(run(x), dy, leaves)
        torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).backward(dy)
        for leaf, other in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, other)


def test_a_change_in_place_between_forward_and_backward_is_refused(make_weight, randn):
    weight = make_weight(4)
    x = randn(7, weight.spec.in_features).requires_grad_()
    y = quantized_linear(x, weight, None)
    weight.offsets.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
