"""Training steps on a whole model: both kinds of gradient checkpointing, seeds, autocast."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from qalora_plugin import QALoRAConfig


def _gradients(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_hooks", "reentrant"])
@pytest.mark.parametrize("adapt", ["zeros", "both"])
def test_gradient_checkpointing_changes_nothing(make_peft, ids, adapt, use_reentrant):
    model = make_peft(adapt=adapt).train()
    loss, wanted = _gradients(model, ids)
    assert all(grad.any() for grad in wanted.values())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    again, found = _gradients(model, ids)
    assert torch.equal(again, loss)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-8)


def _train(make_llama, ids, **adapter):
    model = get_peft_model(make_llama(), QALoRAConfig(r=4, **adapter)).train()
    torch.manual_seed(7)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(model)


@pytest.mark.parametrize("adapter", [{}, {"adapt": "both"}, {"lora_dropout": 0.1}], ids=str)
def test_training_learns_and_repeats_bit_for_bit(make_llama, ids, adapter):
    torch.manual_seed(1)
    losses, first = _train(make_llama, ids, **adapter)
    assert losses[-1] < losses[0] - 0.3
    torch.manual_seed(2)
    repeated, second = _train(make_llama, ids, **adapter)
    assert losses == repeated
    assert all(torch.equal(first[key], second[key]) for key in first)
    _, other = _train(make_llama, ids, **adapter, seed=1)
    assert any(not torch.equal(first[key], other[key]) for key in first)
