"""Every operator on every backend against the dense formula in float64."""

import torch

from qalora_kernels import ops, reference

ROWS = (1, 7, 63, 70)  # 70 is past the last bucket that the CPU's default plan fuses


def group_sums(values, layer):
    """[K, N] -> [G, N] by the dense 0/1 matrix."""
    spec = layer.spec
    return reference.pool(values.t(), layer.g_idx, spec.group_size).t()


def test_dequantize_equals_the_formula_to_the_bit(backend, bits, layout, dtype, make_layer):
    layer = make_layer(bits, layout)
    spec = layer.spec
    out = ops.dequantize(*layer.tensors, bits, spec.group_size, spec.in_features, dtype)
    assert out.dtype == dtype
    assert torch.equal(out, layer.weight_t(dtype))


def test_dequantize_float64(backend, bits, make_layer):
    layer = make_layer(bits)
    spec = layer.spec
    out = ops.dequantize(*layer.tensors, bits, spec.group_size, spec.in_features, torch.float64)
    assert torch.equal(out, layer.weight_t(torch.float64))


def test_pool(backend, layout, dtype, make_layer, randn, assert_as_good_as):
    layer = make_layer(4, layout)
    group_size = layer.spec.group_size
    for m in ROWS:
        x = randn(m, layer.spec.in_features, dtype=dtype)
        out = ops.pool(x, layer.g_idx, group_size)
        assert out.dtype == dtype
        assert_as_good_as(
            out,
            reference.pool(x, layer.g_idx, group_size),
            reference.pool(x.double(), layer.g_idx, group_size),
        )


def test_linear(backend, bits, layout, dtype, make_layer, randn, assert_as_good_as):
    layer = make_layer(bits, layout)
    spec = layer.spec
    for m in ROWS:
        x = randn(m, spec.in_features, dtype=dtype)
        out = ops.linear(x, *layer.tensors, None, bits, spec.group_size)
        assert out.dtype == dtype
        assert_as_good_as(
            out,
            x @ layer.weight_t(dtype),
            x.double() @ layer.weight_t(torch.float64),
        )


def test_linear_adds_the_bias(backend, dtype, make_layer, randn, assert_as_good_as):
    layer = make_layer(4)
    bias = randn(layer.spec.out_features, dtype=dtype)
    for m in ROWS:
        x = randn(m, layer.spec.in_features, dtype=dtype)
        assert_as_good_as(
            ops.linear(x, *layer.tensors, bias, 4, layer.spec.group_size),
            reference.linear(x, layer.weight_t(dtype), bias),
            reference.linear(x.double(), layer.weight_t(torch.float64), bias.double()),
        )


def test_grad_input(backend, bits, layout, dtype, make_layer, randn, assert_as_good_as):
    layer = make_layer(bits, layout)
    spec = layer.spec
    for m in ROWS:
        dy = randn(m, spec.out_features, dtype=dtype)
        out = ops.grad_input(dy, *layer.tensors, bits, spec.group_size, spec.in_features)
        assert out.dtype == dtype
        assert_as_good_as(
            out,
            dy @ layer.weight_t(dtype).t(),
            dy.double() @ layer.weight_t(torch.float64).t(),
        )


def test_pooled_grad(backend, dtype, randn, assert_as_good_as):
    for m in ROWS:
        dy, pooled = randn(m, 37, dtype=dtype), randn(m, 6, dtype=dtype)
        out = ops.pooled_grad(dy, pooled)
        assert out.dtype == torch.float32
        assert_as_good_as(out, pooled.t() @ dy, pooled.double().t() @ dy.double())


def test_weighted_group_grad(backend, bits, layout, dtype, make_layer, randn, assert_as_good_as):
    layer = make_layer(bits, layout)
    spec = layer.spec
    for m in ROWS:
        dy = randn(m, spec.out_features, dtype=dtype)
        x = randn(m, spec.in_features, dtype=dtype)
        out = ops.weighted_group_grad(dy, x, *layer.tensors, bits, spec.group_size)
        assert out.dtype == torch.float32
        assert_as_good_as(
            out,
            group_sums((x.t() @ dy) * layer.weight_t(dtype), layer),
            group_sums((x.double().t() @ dy.double()) * layer.weight_t(torch.float64), layer),
        )


def test_sums_over_tokens_pass_the_range_of_fp16(backend, make_layer):
    layer = make_layer(4)
    spec, device = layer.spec, layer.qweight.device
    dy = torch.full((63, spec.out_features), 100.0, dtype=torch.float16, device=device)
    pooled = torch.full((63, spec.num_groups), 100.0, dtype=torch.float16, device=device)
    assert torch.equal(
        ops.pooled_grad(dy, pooled),
        torch.full((spec.num_groups, spec.out_features), 630000.0, device=device),
    )
    x = torch.full((63, spec.in_features), 100.0, dtype=torch.float16, device=device)
    out = ops.weighted_group_grad(dy, x, *layer.tensors, 4, spec.group_size)
    exact = group_sums(630000.0 * layer.weight_t(torch.float64), layer)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1.0)


def test_no_rows(backend, make_layer, device):
    layer = make_layer(4)
    spec = layer.spec
    x = torch.empty(0, spec.in_features, device=device)
    dy = torch.empty(0, spec.out_features, device=device)
    assert ops.linear(x, *layer.tensors, None, 4, spec.group_size).shape == dy.shape
    assert ops.pool(x, None, spec.group_size).shape == (0, spec.num_groups)
    out = ops.weighted_group_grad(dy, x, *layer.tensors, 4, spec.group_size)
    assert not out.any()
    assert not ops.pooled_grad(dy, ops.pool(x, None, spec.group_size)).any()


def test_the_same_call_gives_the_same_bits(backend, make_layer, randn):
    layer = make_layer(3, "act_order")
    spec = layer.spec
    x, dy = randn(63, spec.in_features), randn(63, spec.out_features)
    calls = {
        "linear": lambda: ops.linear(x, *layer.tensors, None, 3, spec.group_size),
        "grad_input": lambda: ops.grad_input(
            dy, *layer.tensors, 3, spec.group_size, spec.in_features
        ),
        "pool": lambda: ops.pool(x, layer.g_idx, spec.group_size),
        "weighted_group_grad": lambda: ops.weighted_group_grad(
            dy, x, *layer.tensors, 3, spec.group_size
        ),
    }
    for name, call in calls.items():
        assert torch.equal(call(), call()), name


def test_tensors_that_are_not_contiguous(backend, make_layer, randn):
    layer = make_layer(4, "act_order")
    spec = layer.spec
    x = randn(spec.in_features, 7).t()
    dy = randn(spec.out_features, 7).t()
    spread = [None if t is None else t.t().contiguous().t() for t in layer.tensors]
    spread[3] = torch.stack([layer.g_idx, layer.g_idx], dim=1)[:, 0]
    assert not any(t.is_contiguous() for t in (x, dy, *spread))

    def same(op, spread_arguments, arguments):
        torch.testing.assert_close(op(*spread_arguments), op(*arguments), rtol=1e-5, atol=1e-5)

    size, k = spec.group_size, spec.in_features
    xc, dyc, packed = x.contiguous(), dy.contiguous(), layer.tensors
    fp32 = torch.float32
    same(ops.dequantize, (*spread, 4, size, k, fp32), (*packed, 4, size, k, fp32))
    same(ops.pool, (x, spread[3], size), (xc, packed[3], size))
    same(ops.linear, (x, *spread, None, 4, size), (xc, *packed, None, 4, size))
    same(ops.grad_input, (dy, *spread, 4, size, k), (dyc, *packed, 4, size, k))
    same(ops.weighted_group_grad, (dy, x, *spread, 4, size), (dyc, xc, *packed, 4, size))
