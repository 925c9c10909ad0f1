"""The differentiable layers, forward and backward, against a dense float64 layer."""

import pytest
import torch

from qalora_kernels import LowRank, fold, folded_linear, ops, quantized_linear, reference
from qalora_kernels.groups import expand

RANK, FACTOR = 4, 0.5


def low_rank(layer, randn, mode):
    """(zeros, scale) of the mode, as dicts of fp32 leaves."""
    spec = layer.spec

    def part(seed_rank):
        a = randn(seed_rank, spec.num_groups, scale=0.1).requires_grad_()
        b = randn(spec.out_features, seed_rank, scale=0.1).requires_grad_()
        return LowRank(a, b, FACTOR)

    return (
        part(RANK) if mode in ("zeros", "both") else None,
        part(RANK + 1) if mode in ("scales", "both") else None,
    )


def dense(x, layer, zeros, scale, bias):
    """The folded layer as dense algebra in the dtype of x: the weight that folding rounds to, and
    the adapter's change added to it with value zero, so that autograd differentiates the formula.
    """
    spec, dtype = layer.spec, x.dtype

    def change(part):
        if part is None:
            return 0.0
        delta = FACTOR * (part.a.to(dtype).t() @ part.b.to(dtype).t())
        return expand(delta - delta.detach(), layer.g_idx, spec.group_size, spec.in_features)

    with torch.no_grad():
        new = fold(
            layer.scales,
            layer.offsets,
            zeros=None if zeros is None else zeros.delta(),
            scale=None if scale is None else scale.delta(),
        )
    weight_t = type(layer)(spec, layer.qweight, *new, layer.g_idx).weight_t(dtype)
    weight_t = weight_t + change(zeros) + change(scale) * layer.weight_t(dtype)
    return reference.linear(x, weight_t, None if bias is None else bias.to(dtype))


def gradients(output, dy, leaves):
    return torch.autograd.grad(output, leaves, dy.to(output.dtype))


@pytest.mark.parametrize("mode", ["zeros", "scales", "both"])
def test_folded_linear(backend, bits, dtype, mode, make_layer, randn, assert_as_good_as):
    layout = {2: "short_last_group", 3: "group_across_words", 4: "act_order", 8: "one_group"}[bits]
    layer = make_layer(bits, layout)
    spec = layer.spec
    zeros, scale = low_rank(layer, randn, mode)
    x = randn(63, spec.in_features, dtype=dtype).requires_grad_()
    dy = randn(63, spec.out_features, dtype=dtype)
    bias = randn(spec.out_features, dtype=dtype).requires_grad_()
    leaves = [x, bias] + [t for part in (zeros, scale) if part for t in (part.a, part.b)]
    ours = folded_linear(x, *layer.tensors, bias, spec=spec, zeros=zeros, scale=scale)
    plain = dense(x, layer, zeros, scale, bias)
    exact = dense(x.double(), layer, zeros, scale, bias.double())
    assert ours.dtype == dtype
    assert_as_good_as(ours.detach(), plain.detach(), exact.detach())

    # fp64 leaves of their own: the cast of a leaf would round the exact gradient
    wide_zeros, wide_scale = (
        None if p is None else LowRank(p.a.detach().double(), p.b.detach().double(), FACTOR)
        for p in (zeros, scale)
    )
    wide = [x.detach().double(), bias.detach().double()]
    wide += [t for part in (wide_zeros, wide_scale) if part for t in (part.a, part.b)]
    for leaf in wide:
        leaf.requires_grad_()
    exact = dense(wide[0], layer, wide_zeros, wide_scale, wide[1])
    for mine, other, truth in zip(
        gradients(ours, dy, leaves),
        gradients(plain, dy, leaves),
        gradients(exact, dy, wide),
        strict=True,
    ):
        assert_as_good_as(mine, other, truth)


def test_a_merged_layer_gives_the_same_bits_as_the_folded_one(backend, bits, make_layer, randn):
    layer = make_layer(bits)
    zeros, scale = low_rank(layer, randn, "both")
    x = randn(7, layer.spec.in_features, dtype=torch.float16)
    folded = folded_linear(x, *layer.tensors, None, spec=layer.spec, zeros=zeros, scale=scale)
    merged = fold(layer.scales, layer.offsets, zeros=zeros.delta(), scale=scale.delta())
    plain = quantized_linear(
        x, layer.qweight, *(t.detach() for t in merged), layer.g_idx, None, spec=layer.spec
    )
    assert torch.equal(folded, plain)


def test_quantized_linear_gradients(backend, make_layer, randn, assert_as_good_as):
    layer = make_layer(4)
    spec = layer.spec
    x = randn(2, 3, spec.in_features, dtype=torch.float16).requires_grad_()
    bias = randn(spec.out_features, dtype=torch.float16).requires_grad_()
    dy = randn(2, 3, spec.out_features, dtype=torch.float16)
    ours = quantized_linear(x, *layer.tensors, bias, spec=spec)
    assert ours.shape == (2, 3, spec.out_features)
    wide, wide_bias = (t.detach().double().requires_grad_() for t in (x, bias))
    exact = reference.linear(wide, layer.weight_t(torch.float64), wide_bias)
    plain = reference.linear(x, layer.weight_t(torch.float16), bias)
    for mine, other, truth in zip(
        gradients(ours, dy, (x, bias)),
        gradients(plain, dy, (x, bias)),
        gradients(exact, dy, (wide, wide_bias)),
        strict=True,
    ):
        assert_as_good_as(mine, other, truth)


@pytest.mark.parametrize("mode", ["zeros", "both"])
def test_compiles_without_graph_breaks(backend, mode, make_layer, randn):
    layer = make_layer(4, "act_order")
    spec = layer.spec
    zeros, scale = low_rank(layer, randn, mode)
    x = randn(7, spec.in_features).requires_grad_()

    def step(x):
        y = folded_linear(x, *layer.tensors, None, spec=spec, zeros=zeros, scale=scale)
        return y.square().sum()

    expected = gradients(step(x), torch.ones((), device=x.device), (x, zeros.a, zeros.b))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = gradients(compiled(x), torch.ones((), device=x.device), (x, zeros.a, zeros.b))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_operators_declare_what_they_return(backend, make_layer, randn):
    layer = make_layer(4, "act_order")
    spec = layer.spec
    x, dy = randn(7, spec.in_features), randn(7, spec.out_features)
    size, k = spec.group_size, spec.in_features
    tests = ("test_schema", "test_faketensor")
    samples = {
        ops.dequantize: (*layer.tensors, 4, size, k, torch.float16),
        ops.pool: (x, layer.g_idx, size),
        ops.linear: (x, *layer.tensors, None, 4, size),
        ops.grad_input: (dy, *layer.tensors, 4, size, k),
        ops.pooled_grad: (dy, randn(7, spec.num_groups)),
        ops.weighted_group_grad: (dy, x, *layer.tensors, 4, size),
    }
    for op, arguments in samples.items():
        torch.library.opcheck(op, arguments, test_utils=tests)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant, make_layer, randn):
    layer = make_layer(4)
    zeros, _ = low_rank(layer, randn, "zeros")
    x = randn(7, layer.spec.in_features).requires_grad_()

    def run(x):
        return folded_linear(x, *layer.tensors, None, spec=layer.spec, zeros=zeros)

    dy = torch.ones(7, layer.spec.out_features, device=x.device)
    expected = gradients(run(x), dy, (x, zeros.a, zeros.b))
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).backward(dy)
    for leaf, other in zip((x, zeros.a, zeros.b), expected, strict=True):
        torch.testing.assert_close(leaf.grad, other)
