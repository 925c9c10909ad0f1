"""What an operator refuses, before a kernel runs, and in which words."""

import pytest
import torch

from qalora_kernels import checks, folded_linear, ops, quantized_linear


def arguments(layer, randn):
    return {
        "x": randn(7, layer.spec.in_features),
        "qweight": layer.qweight,
        "scales": layer.scales,
        "offsets": layer.offsets,
        "g_idx": layer.g_idx,
        "bias": randn(layer.spec.out_features),
        "bits": layer.spec.bits,
        "group_size": layer.spec.group_size,
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.int(), "x: expected dtype torch.float16 or .* found torch.int32"),
        ("x", lambda t: t[0], r"x: expected 2 dimensions, found shape \(172,\)"),
        ("qweight", lambda t: t.long(), "qweight: expected dtype torch.int32, found torch.int64"),
        ("qweight", lambda t: t[:-1], r"qweight: expected shape \(24, 37\), found \(23, 37\)"),
        ("qweight", lambda t: t[0], "qweight: expected 2 dimensions"),
        ("scales", lambda t: t.int(), "scales: expected dtype"),
        ("scales", lambda t: t[1:], r"scales: expected shape \(6, 37\), found \(5, 37\)"),
        ("offsets", lambda t: t[:, 1:], r"offsets: expected shape \(6, 37\), found \(6, 36\)"),
        ("g_idx", lambda t: t.long(), "g_idx: expected dtype torch.int32, found torch.int64"),
        ("g_idx", lambda t: t[:-1], r"g_idx: expected shape \(172,\), found \(171,\)"),
        ("g_idx", lambda t: t + 1, r"g_idx: expected values in \[0, 6\), found 1 to 6"),
        ("g_idx", lambda t: t - 1, r"g_idx: expected values in \[0, 6\), found -1 to 4"),
        ("bias", lambda t: t[1:], r"bias: expected shape \(37,\), found \(36,\)"),
        ("bits", lambda bits: 5, "bits must be one of"),
        ("group_size", lambda size: 0, "group_size must be positive"),
    ],
)
def test_linear_refuses(backend, name, change, message, make_layer, randn):
    values = arguments(make_layer(4, "act_order"), randn)
    values[name] = change(values[name])
    with pytest.raises(ValueError, match=message):
        ops.linear(*values.values())


def test_mixed_devices_are_refused(make_layer):
    layer = make_layer(4)
    # the check itself: the dispatcher takes a tensor on meta as a question about shapes
    with pytest.raises(ValueError, match=r"offsets: expected device .*, found meta"):
        checks.packed(layer.qweight, layer.scales, layer.offsets.to("meta"), None, layer.spec)


def test_every_operator_checks_its_tensors(backend, make_layer, randn):
    layer = make_layer(4, "act_order")
    spec = layer.spec
    x, dy = randn(7, spec.in_features), randn(7, spec.out_features)
    bad = (layer.qweight, layer.scales[1:], layer.offsets, layer.g_idx)
    size, k = spec.group_size, spec.in_features
    calls = {
        "scales": [
            lambda: ops.dequantize(*bad, 4, size, k, torch.float32),
            lambda: ops.linear(x, *bad, None, 4, size),
            lambda: ops.grad_input(dy, *bad, 4, size, k),
            lambda: ops.weighted_group_grad(dy, x, *bad, 4, size),
        ],
        "g_idx": [lambda: ops.pool(x, layer.g_idx + 1, size)],
        "dy": [
            lambda: ops.grad_input(dy[:, 1:], *layer.tensors, 4, size, k),
            lambda: ops.weighted_group_grad(dy[:, 1:], x, *layer.tensors, 4, size),
        ],
        "pooled": [lambda: ops.pooled_grad(dy, dy[1:]), lambda: ops.pooled_grad(dy, dy.half())],
        "x": [lambda: ops.weighted_group_grad(dy, x[1:], *layer.tensors, 4, size)],
        "dtype": [lambda: ops.dequantize(*layer.tensors, 4, size, k, torch.int8)],
    }
    for name, of_name in calls.items():
        for call in of_name:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                call()


def test_g_idx_is_checked_again_after_an_in_place_change(backend, make_layer, randn):
    layer = make_layer(4, "act_order")
    x = randn(7, layer.spec.in_features)
    ops.pool(x, layer.g_idx, 32)
    layer.g_idx[0] = 6
    with pytest.raises(ValueError, match=r"g_idx: expected values in \[0, 6\), found 0 to 6"):
        ops.pool(x, layer.g_idx, 32)


def test_g_idx_of_inference_mode(backend, make_layer, randn):
    layer = make_layer(4, "act_order")
    x = randn(7, layer.spec.in_features)
    expected = ops.pool(x, layer.g_idx, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ops.pool(x, layer.g_idx.clone(), 32), expected)


@pytest.mark.parametrize("function", [folded_linear, quantized_linear])
def test_layers_refuse_another_number_of_features(backend, function, make_layer, randn):
    layer = make_layer(4)
    # 172 * 171 numbers would also make 171 rows of 172
    with pytest.raises(ValueError, match="expected 172 features in the last dimension"):
        function(randn(172, 171), *layer.tensors, None, spec=layer.spec)


def test_backend_names(monkeypatch):
    from qalora_kernels import get_backend

    monkeypatch.setenv("QALORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"QALORA_BACKEND must be one of .*, found 'cuda'"):
        get_backend("cpu")
