"""`merge_last_checkpoint` when a training does not get to its end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from qalora_plugin import MergeCallback, QALoRAConfig, QALoRAQuantConfig, verify_merge


class _Interrupt(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_interrupted_training_merges_the_last_checkpoint(kind, bases, make_trainer, tmp_path):
    kwargs: dict[str, Any] = {"dtype": "float32"}
    if kind == "dense":
        kwargs["quantization_config"] = QALoRAQuantConfig(bits=4, group_size=32)
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(
        bases[kind],
        callbacks=[callback, _Interrupt()],
        model_init_kwargs=kwargs,
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "merged").exists()
    result = callback.merge_last_checkpoint()
    assert result is not None and result.out == tmp_path / "merged"
    # "dense" and "ours" have the same integers: one is the other, quantized while loading
    verify_merge(tmp_path / "merged", tmp_path / "run" / "checkpoint-2", bases["ours"])


def test_interrupted_training_merges_the_best_checkpoint(
    bases,
    make_trainer,
    text_rows,
    tmp_path,
):
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(
        bases["ours"],
        callbacks=[callback, _Interrupt()],
        eval_data=text_rows(4),
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls: the first checkpoint counts as the best
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1" and (tmp_path / "run" / "checkpoint-3").exists()
    assert callback.merge_last_checkpoint() is not None
    verify_merge(tmp_path / "merged", best, bases["ours"])


def test_nothing_saved_before_the_interrupt(
    bases,
    make_trainer,
    tmp_path,
    caplog,
):
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(bases["ours"], callbacks=[callback, _Interrupt()], max_steps=5)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.merge_last_checkpoint() is None
    assert "no checkpoint was saved" in caplog.text
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("told", [False, True])
def test_interrupted_before_the_first_new_checkpoint(told, bases, make_trainer, tmp_path):
    """After resuming, the checkpoint that was resumed from is the last; of an adapter with a name
    of its own it lies one directory below."""

    def trainer(callbacks, **settings):
        model = AutoModelForCausalLM.from_pretrained(bases["ours"], dtype=torch.float32)
        config = QALoRAConfig(r=4, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, adapter_name="tuned")
        settings |= {"save_strategy": "steps", "save_steps": 3}
        return make_trainer(model, callbacks=callbacks, adapter=None, **settings)

    trainer([], max_steps=3).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    settings: dict[str, Any] = {"run": "other", "resume_from_checkpoint": str(checkpoint)}
    callback = MergeCallback(tmp_path / "merged")
    resumed = trainer([callback, _Interrupt()], max_steps=5, **(settings if told else {}))
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    result = callback.merge_last_checkpoint()
    assert result is not None and result.layers == 14
    verify_merge(tmp_path / "merged", checkpoint / "tuned", bases["ours"])


def test_resumed_beside_the_checkpoint_of_another_training(bases, make_trainer, tmp_path):
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    make_trainer(bases["ours"], run="first", **saving).train()
    make_trainer(bases["ours"], learning_rate=1e-3, **saving).train()
    callback = MergeCallback(tmp_path / "merged")
    saving["max_steps"] = 5
    trainer = make_trainer(bases["ours"], callbacks=[callback, _Interrupt()], **saving)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-3"))
    assert callback.merge_last_checkpoint() is not None
    first = tmp_path / "first" / "checkpoint-3"
    verify_merge(tmp_path / "merged", first, bases["ours"])
