"""Every operator on every backend against the dense formula in float64."""

import itertools
from dataclasses import replace

import torch

from qalora_kernels import ops, reference

ROWS = (1, 7, 63, 70)  # 70 is past the last bucket that the CPU's default plan fuses


def dense(weight, dtype):
    """W^T [K, N], in `dtype` as plain PyTorch would have it and in float64."""
    plain = reference.dequantize(weight, torch.float32).to(dtype)
    return plain, reference.dequantize(weight, torch.float64)


def group_sums(values, weight):
    """[K, N] -> [G, N] by the dense 0/1 matrix."""
    return reference.pool(values.t(), weight.g_idx, weight.spec.group_size).t()


def test_dequantize_equals_the_formula_to_the_bit(case, make_weight):
    bits, layout, dtype = case
    weight = make_weight(bits, layout)
    plain, exact = dense(weight, dtype)
    for wanted in (plain, exact):
        out = weight.dequantize(wanted.dtype)
        assert out.dtype == wanted.dtype
        assert torch.equal(out, wanted)


def test_dequantize_reads_scales_and_offsets_of_any_dtype(backend, make_weight):
    weight = make_weight(4, "act_order")
    for grid in (torch.float16, torch.float32, torch.float64):
        scales, offsets = weight.scales.to(grid), weight.offsets.to(grid)
        same = replace(weight, scales=scales, offsets=offsets)
        assert torch.equal(same.dequantize(torch.float32), dense(weight, torch.float32)[0]), grid


def test_pool(backend, layouts, make_weight, randn, assert_as_good_as):
    for bits, layout in layouts:
        weight = make_weight(bits, layout)
        g_idx, group_size = weight.g_idx, weight.spec.group_size
        for m, dtype in itertools.product(ROWS, (torch.float32, torch.float16, torch.bfloat16)):
            x = randn(m, weight.spec.in_features, dtype=dtype)
            out = ops.pool(x, g_idx, group_size)
            assert out.dtype == dtype
            plain = reference.pool(x, g_idx, group_size)
            assert_as_good_as(out, plain, reference.pool(x.double(), g_idx, group_size))


def test_products(case, make_weight, randn, assert_as_good_as):
    bits, layout, dtype = case
    weight = make_weight(bits, layout)
    plain, exact = dense(weight, dtype)
    bias = randn(weight.spec.out_features, dtype=dtype)
    for m in ROWS:
        x = randn(m, weight.spec.in_features, dtype=dtype)
        y = ops.linear(x, weight, None)
        assert_as_good_as(y, x @ plain, x.double() @ exact)
        assert_as_good_as(
            ops.linear(x, weight, bias),
            x @ plain + bias,
            x.double() @ exact + bias.double(),
        )
        dy = randn(m, weight.spec.out_features, dtype=dtype)
        dx = ops.grad_input(dy, weight)
        assert_as_good_as(dx, dy @ plain.t(), dy.double() @ exact.t())
        assert y.dtype == dx.dtype == dtype


def test_gradients_of_the_grid(case, make_weight, randn, assert_as_good_as):
    bits, layout, dtype = case
    weight = make_weight(bits, layout)
    plain, exact = dense(weight, dtype)
    for m in ROWS:
        dy = randn(m, weight.spec.out_features, dtype=dtype)
        x = randn(m, weight.spec.in_features, dtype=dtype)
        pooled = randn(m, weight.spec.num_groups, dtype=dtype)
        out = ops.pooled_grad(dy, pooled)
        assert out.dtype == torch.float32
        assert_as_good_as(out, pooled.t() @ dy, pooled.double().t() @ dy.double())
        out = ops.weighted_group_grad(dy, x, weight)
        assert out.dtype == torch.float32
        assert_as_good_as(
            out,
            group_sums((x.t() @ dy) * plain, weight),
            group_sums((x.double().t() @ dy.double()) * exact, weight),
        )


def test_sums_over_tokens_pass_the_range_of_fp16(backend, make_weight):
    weight = make_weight(4)
    spec, device = weight.spec, weight.qweight.device
    dy = torch.full((63, spec.out_features), 100.0, dtype=torch.float16, device=device)
    pooled = torch.full((63, spec.num_groups), 100.0, dtype=torch.float16, device=device)
    assert torch.equal(
        ops.pooled_grad(dy, pooled),
        torch.full((spec.num_groups, spec.out_features), 630000.0, device=device),
    )
    x = torch.full((63, spec.in_features), 100.0, dtype=torch.float16, device=device)
    out = ops.weighted_group_grad(dy, x, weight)
    exact = group_sums(630000.0 * dense(weight, torch.float32)[1], weight)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1.0)


def test_no_rows(backend, make_weight, device):
    weight = make_weight(4)
    spec = weight.spec
    x = torch.empty(0, spec.in_features, device=device)
    dy = torch.empty(0, spec.out_features, device=device)
    assert ops.linear(x, weight, None).shape == dy.shape
    pooled = ops.pool(x, None, spec.group_size)
    assert pooled.shape == (0, spec.num_groups)
    assert not ops.weighted_group_grad(dy, x, weight).any()
    assert not ops.pooled_grad(dy, pooled).any()


def test_the_same_call_gives_the_same_bits(backend, make_weight, randn):
    weight = make_weight(3, "act_order")
    x, dy = randn(63, weight.spec.in_features), randn(63, weight.spec.out_features)
    calls = {
        "linear": lambda: ops.linear(x, weight, None),
        "grad_input": lambda: ops.grad_input(dy, weight),
        "pool": lambda: ops.pool(x, weight.g_idx, weight.spec.group_size),
        "weighted_group_grad": lambda: ops.weighted_group_grad(dy, x, weight),
    }
    for name, call in calls.items():
        assert torch.equal(call(), call()), name


def test_tensors_that_are_not_contiguous(backend, make_weight, randn):
    weight = make_weight(4, "act_order")
    x, dy = randn(weight.spec.in_features, 7).t(), randn(weight.spec.out_features, 7).t()
    tensors = [t.t().contiguous().t() for t in weight.tensors[:3]]
    g_idx = torch.stack([weight.g_idx, weight.g_idx], dim=1)[:, 0]
    spread = type(weight)(*tensors, g_idx, weight.spec)
    assert not any(t.is_contiguous() for t in (x, dy, *spread.tensors))

    def same(op, spread_arguments, arguments):
        torch.testing.assert_close(op(*spread_arguments), op(*arguments), rtol=1e-5, atol=1e-5)

    xc, dyc, size = x.contiguous(), dy.contiguous(), weight.spec.group_size
    same(ops.dequantize, (spread, torch.float32), (weight, torch.float32))
    same(ops.pool, (x, g_idx, size), (xc, weight.g_idx, size))
    same(ops.linear, (x, spread, None), (xc, weight, None))
    same(ops.grad_input, (dy, spread), (dyc, weight))
    same(ops.weighted_group_grad, (dy, x, spread), (dyc, xc, weight))
