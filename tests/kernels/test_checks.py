"""What an operator refuses, before a kernel runs, and in which words."""

from dataclasses import replace

import pytest
import torch

from qalora_kernels import checks, folded_linear, get_backend, ops, quantized_linear


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.int(), "x: expected dtype torch.float16 or .* found torch.int32"),
        ("x", lambda t: t[0], r"x: expected 2 dimensions, found shape \(172,\)"),
        ("qweight", lambda t: t.long(), "qweight: expected dtype torch.int32, found torch.int64"),
        ("qweight", lambda t: t[:-1], r"qweight: expected shape \(24, 37\), found \(23, 37\)"),
        ("qweight", lambda t: t[:, 1:], r"qweight: expected shape \(24, 37\), found \(24, 36\)"),
        ("qweight", lambda t: t[0], r"qweight: expected shape \(24, 37\), found \(37,\)"),
        ("scales", lambda t: t.int(), "scales: expected dtype"),
        ("scales", lambda t: t[1:], r"scales: expected shape \(6, 37\), found \(5, 37\)"),
        ("offsets", lambda t: t[:, 1:], r"offsets: expected shape \(6, 37\), found \(6, 36\)"),
        ("g_idx", lambda t: t.long(), "g_idx: expected dtype torch.int32, found torch.int64"),
        ("g_idx", lambda t: t[:-1], r"g_idx: expected shape \(172,\), found \(171,\)"),
        ("g_idx", lambda t: t + 1, r"g_idx: expected values in \[0, 6\), found 1 to 6"),
        ("g_idx", lambda t: t - 1, r"g_idx: expected values in \[0, 6\), found -1 to 4"),
        ("bias", lambda t: t[1:], r"bias: expected shape \(37,\), found \(36,\)"),
    ],
)
def test_linear_refuses(name, change, message, make_weight, randn):
    weight = make_weight(4, "act_order")
    values = {"x": randn(7, 172), "bias": randn(37)}
    if name in values:
        values[name] = change(values[name])
    else:
        weight = replace(weight, **{name: change(getattr(weight, name))})
    with pytest.raises(ValueError, match=message):
        ops.linear(values["x"], weight, values["bias"])


def test_mixed_devices_are_refused(make_weight):
    weight = make_weight(4)
    weight = replace(weight, offsets=weight.offsets.to("meta"))
    # the check itself: the dispatcher takes a tensor on meta as a question about shapes
    with pytest.raises(ValueError, match=r"offsets: expected device .*, found meta"):
        checks.packed(weight)


def test_every_operator_checks_its_tensors(make_weight, randn):
    weight = make_weight(4, "act_order")
    x, dy, size = randn(7, 172), randn(7, 37), weight.spec.group_size
    bad = replace(weight, scales=weight.scales[1:])
    calls = {
        "scales: expected": [
            lambda: bad.dequantize(torch.float32),
            lambda: ops.linear(x, bad, None),
            lambda: ops.grad_input(dy, bad),
            lambda: ops.weighted_group_grad(dy, x, bad),
        ],
        "g_idx: expected": [lambda: ops.pool(x, weight.g_idx + 1, size)],
        "group_size must be positive": [lambda: ops.pool(x, None, 0)],
        "dy: expected": [
            lambda: ops.grad_input(dy[:, 1:], weight),
            lambda: ops.weighted_group_grad(dy[:, 1:], x, weight),
        ],
        "pooled: expected": [
            lambda: ops.pooled_grad(dy, dy[1:]),
            lambda: ops.pooled_grad(dy, dy.half()),
        ],
        "x: expected": [lambda: ops.weighted_group_grad(dy, x[1:], weight)],
        "dtype: expected": [lambda: weight.dequantize(torch.int8)],
    }
    for message, of_message in calls.items():
        for call in of_message:
            with pytest.raises(ValueError, match=f"^{message}"):
                call()


def test_g_idx_is_checked_once_and_again_after_an_in_place_change(backend, make_weight, randn):
    g_idx, x = make_weight(4, "act_order").g_idx, randn(7, 172)
    expected = ops.pool(x, g_idx, 32)
    with torch.inference_mode():  # whose tensors count no changes
        torch.testing.assert_close(ops.pool(x, g_idx.clone(), 32), expected)
    g_idx[0] = 6
    with pytest.raises(ValueError, match=r"g_idx: expected values in \[0, 6\), found 0 to 6"):
        ops.pool(x, g_idx, 32)


def test_layers_refuse_another_number_of_features(make_weight, randn):
    for function in (folded_linear, quantized_linear):
        # 172 * 171 numbers would also make 171 rows of 172
        with pytest.raises(ValueError, match="expected 172 features in the last dimension"):
            function(randn(172, 171), make_weight(4), None)


def test_which_backend_serves(monkeypatch):
    from qalora_kernels.backends import cpu
    from qalora_kernels.backends import torch as plain

    monkeypatch.delenv("QALORA_BACKEND", raising=False)
    assert get_backend("cpu", torch.bfloat16) is cpu
    assert get_backend("meta", torch.bfloat16) is plain
    for name in ("cpu", "torch", "triton"):
        monkeypatch.setenv("QALORA_BACKEND", name)
        assert get_backend("cpu", torch.float64) is plain  # no other has float64
    monkeypatch.setenv("QALORA_BACKEND", "torch")
    assert get_backend("cpu", torch.bfloat16) is plain
    monkeypatch.setenv("QALORA_BACKEND", "cpu")
    with pytest.raises(ValueError, match="QALORA_BACKEND=cpu got tensors on cuda"):
        get_backend("cuda", torch.float64)
    monkeypatch.setenv("QALORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"QALORA_BACKEND must be one of .*, found 'cuda'"):
        get_backend("cpu", torch.float32)
