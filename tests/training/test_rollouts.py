"""What is sent to vLLM after a step."""

import torch
from peft import get_peft_model
from support.layers import quantize
from support.models import llama

from qalora_plugin import QALoRAConfig
from qalora_plugin.training.rollouts import changed_tensors


def test_whole_modules_that_the_active_adapter_does_not_have_are_the_bases():
    model = get_peft_model(quantize(llama()), QALoRAConfig(r=2, modules_to_save=["lm_head"]))
    head = model.get_base_model().lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    assert torch.equal(
        dict(changed_tensors(model))["lm_head.weight"], 2 * head.original_module.weight
    )
    model.add_adapter("other", QALoRAConfig(r=2))
    model.set_adapter("other")
    assert torch.equal(dict(changed_tensors(model))["lm_head.weight"], head.original_module.weight)
