"""The same training on both backends: equal losses, step by step."""

import pytest
import torch

from qalora_kernels import LowRank, folded_linear

pytest.importorskip("triton", reason="triton is not installed")
STEPS = 50


def train(make_weight, randn):
    """Losses of 50 Adam steps on a random target: both modes, g_idx, a short last group."""
    weight = make_weight(4, "act_order")
    spec, device = weight.spec, weight.qweight.device

    def adapter(rank):
        a = randn(rank, spec.num_groups, scale=0.1).requires_grad_()
        b = torch.zeros(spec.out_features, rank, device=device, requires_grad=True)
        return LowRank(a, b, 1.0)

    zeros, scale = adapter(4), adapter(5)
    x, target = randn(16, spec.in_features), randn(16, spec.out_features)
    optimizer = torch.optim.Adam([zeros.a, zeros.b, scale.a, scale.b], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        y = folded_linear(x, weight, None, zeros=zeros, scale=scale)
        loss = torch.nn.functional.mse_loss(y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_both_backends_give_the_same_losses(make_weight, randn, monkeypatch):
    monkeypatch.setenv("QALORA_TUNING_CACHE", "off")
    monkeypatch.setenv("QALORA_BACKEND", "torch")
    plain = train(make_weight, randn)
    monkeypatch.setenv("QALORA_BACKEND", "triton")
    ours = train(make_weight, randn)
    assert plain[-1] < plain[0] / 2
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-3, atol=0)
