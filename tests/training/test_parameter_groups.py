"""`parameter_groups`: every trained parameter once, at its part's rate, decayed as Trainer does."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, QALoRAError, parameter_groups
from qalora_plugin.tuner.parameter_groups import SCALE_LR_RATIO


def _names(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_the_scales_train_at_their_own_rate(bases, make_trainer):
    """Through SFTTrainer: its schedule multiplies each group's rate, its log shows the first's."""
    adapter = QALoRAConfig(r=4, adapt="both", modules_to_save=["norm"], task_type="CAUSAL_LM")
    trainer = make_trainer(
        bases["ours"], adapter=adapter, max_steps=4, logging_steps=1, lr_scheduler_type="linear"
    )
    groups = parameter_groups(trainer.model, lr=0.01, scale_lr_ratio=3, weight_decay=0.1)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    ordinary, plain, scales = (_names(trainer.model, group) for group in groups)
    assert scales == {name for name in trained if "qalora_scale_" in name}
    assert plain == {name for name in trained if "norm" in name} != set()
    assert ordinary == trained - scales - plain != set()
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (0.01, 0.1),
        (0.01, 0.0),
        (pytest.approx(0.03), 0.1),
    ]

    trainer.optimizer = torch.optim.AdamW(groups)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert trainer.optimizer.param_groups[2]["initial_lr"] == pytest.approx(0.03)


def test_the_trainers_own_groups_decay_the_same(bases, make_trainer):
    adapter = QALoRAConfig(r=4, adapt="both", modules_to_save=["norm"], task_type="CAUSAL_LM")
    trainer = make_trainer(bases["ours"], adapter=adapter, weight_decay=0.1)

    def decays(groups):
        return {n: g["weight_decay"] for g in groups for n in _names(trainer.model, g)}

    theirs = decays(trainer.create_optimizer().param_groups)
    assert decays(parameter_groups(trainer.model, lr=0.01, weight_decay=0.1)) == theirs


@pytest.mark.parametrize(("adapt", "rates"), [("zeros", [1.0]), ("scales", [SCALE_LR_RATIO])])
def test_one_part_is_one_group(bases, adapt, rates):
    model = AutoModelForCausalLM.from_pretrained(bases["ours"])
    model = get_peft_model(model, QALoRAConfig(r=4, adapt=adapt))
    assert [group["lr"] for group in parameter_groups(model, lr=1.0)] == rates


def test_nothing_to_train_or_a_wrong_ratio_is_an_error(bases):
    model = AutoModelForCausalLM.from_pretrained(bases["ours"]).requires_grad_(False)
    with pytest.raises(QALoRAError, match=r"found none\. Add an adapter first"):
        parameter_groups(model, lr=1.0)
    with pytest.raises(QALoRAError, match="scale_lr_ratio: expected a positive number, found -1"):
        parameter_groups(model, lr=1.0, scale_lr_ratio=-1)
