"""The merged weights are those that the log calls the result, or nothing is merged."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model
from support.adapters import edit_tensors
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerState

from qalora_plugin import (
    MergeCallback,
    QALoRAConfig,
    QALoRAQuantConfig,
    quantize_model,
    verify_merge,
)
from qalora_plugin.errors import AdapterError, CheckpointError, ConfigError, OutputError
from qalora_plugin.training.best import best_adapter
from qalora_plugin.training.save import check_savable, save_base

IDS = torch.arange(5, 25)[None]
SAVED = {"save_strategy": "steps", "save_steps": 1}
BEST: dict[str, Any] = {  # the loss falls: the first evaluation counts as the best
    **SAVED,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


class _When(TrainerCallback):
    """Calls `act(model, step)` at one event."""

    def __init__(self, event, act):
        setattr(self, event, lambda args, state, control, **kw: act(kw["model"], state.global_step))


def load(base, **options):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def config(**options):
    return QALoRAConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)


def adapted(base, second=None, **options):
    model = get_peft_model(load(base, **options), config(init_lora_weights=False))
    if second is not None:
        model.add_adapter(second, config(init_lora_weights=False, seed=1))
    return model


def same(merged, model):
    with torch.no_grad():
        return torch.equal(load(merged).eval()(IDS).logits, model.eval()(input_ids=IDS).logits)


def two_active(model):
    model.base_model.set_adapter(["default", "two"])


def trained_norm(model):
    model.get_base_model().model.norm.weight.requires_grad_(True)


def changed_embedding(model):
    model.get_base_model().model.embed_tokens.weight.data[3] *= 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (two_active, r"expected one active adapter, found \['default', 'two'\]"),
        (lambda model: model.base_model.set_adapter("two"), r"\['two'\] in the layers and 'defa"),
        (lambda model: model.disable_adapter_layers(), r"switched off .*enable_adapter_layers"),
        (lambda model: model.merge_adapter(), r"merged into .*unmerge_adapter\(\)"),
        (trained_norm, r"norm\.weight is trained \(1 such .*modules_to_save"),
        (changed_embedding, r"embed_tokens\.weight was changed after .*Save the changed model"),
    ],
)
def test_what_a_merge_would_lose_is_refused_before_training(
    change, message, bases, make_trainer, tmp_path
):
    model = adapted(bases["ours"], second="two")
    change(model)
    trainer = make_trainer(model, adapter=None, callbacks=[MergeCallback(tmp_path / "merged")])
    with pytest.raises(ConfigError, match=message):
        trainer.train()


def test_config_that_was_changed_while_loading_is_refused(bases, make_trainer, tmp_path):
    model = load(bases["ours"], rms_norm_eps=0.1)
    with pytest.raises(ConfigError, match=r"rms_norm_eps .* not as in .*ours/config\.json"):
        make_trainer(model, callbacks=[MergeCallback(tmp_path / "merged")]).train()


def test_a_sharded_base_that_is_quantized_again_has_fp16_scales(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    def adapted_on_loading(**dtypes):
        settings = QALoRAQuantConfig(bits=4, group_size=32, **dtypes)
        return get_peft_model(load(bases["dense"], quantization_config=settings), config())

    model = adapted_on_loading()
    check_savable(model)
    save_base(model, tmp_path / "base")
    assert same(tmp_path / "base", model)
    with pytest.raises(ConfigError, match=r"scales_dtype: expected 'float16' .*found 'bfloat16'"):
        check_savable(adapted_on_loading(scales_dtype="bfloat16"))


def test_a_base_is_quantized_again_from_the_revision_that_was_loaded(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--tiny"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(bases["dense"], repository / "snapshots" / commit)
    edit_tensors(
        repository / "snapshots" / ("a" * 40) / "model.safetensors",
        lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].neg_(),
    )
    settings = QALoRAQuantConfig(bits=4, group_size=32)
    model = load("org/tiny", revision="v2", quantization_config=settings)
    save_base(get_peft_model(model, config()), tmp_path / "base")
    assert same(tmp_path / "base", model)


def test_search_for_hyperparameters_is_refused(bases, make_trainer, tmp_path):
    trainer = make_trainer(bases["ours"])
    state = TrainerState(is_hyper_param_search=True)
    with pytest.raises(ConfigError, match="search for hyperparameters"):
        MergeCallback(tmp_path / "merged").on_train_begin(
            trainer.args, state, trainer.control, model=trainer.model
        )


def test_resized_and_trained_embeddings_and_another_16_bit_type(bases, make_trainer, tmp_path):
    """What looks like a change of the base, and is none, or is saved."""
    model = load(bases["ours"])
    model.resize_token_embeddings(130)
    model = get_peft_model(model, config())
    model.get_input_embeddings().weight.requires_grad_(True)
    make_trainer(model, adapter=None, callbacks=[MergeCallback(tmp_path / "one")]).train()
    assert same(tmp_path / "one", model)
    halved = AutoModelForCausalLM.from_pretrained(bases["ours"], dtype=torch.float16)
    halved.to(torch.float32)
    make_trainer(halved, callbacks=[MergeCallback(tmp_path / "two")]).train()
    assert (tmp_path / "two" / "config.json").exists()


def test_base_in_another_format_is_compared_with_its_config(make_trainer, tmp_path):
    """MLX has its own key for the grid in config.json."""
    base = Path(__file__).parents[1] / "fixtures" / "mlx_4bit_g32_bf16_mixed"
    trainer = make_trainer(load(base), callbacks=[MergeCallback(tmp_path / "merged")])
    trainer.train()
    assert same(tmp_path / "merged", trainer.model)


def test_base_that_is_replaced_while_training_runs(bases, make_trainer, tmp_path):
    def replace(model, step):
        other = load(bases["ours"])
        other.model.norm.weight.data *= 2
        shutil.rmtree(base)
        other.save_pretrained(base)

    base = shutil.copytree(bases["ours"], tmp_path / "base")
    callbacks = [_When("on_step_end", replace), MergeCallback(tmp_path / "merged")]
    with pytest.raises(OutputError, match=r"safe in .*norm\.weight was changed"):
        make_trainer(base, callbacks=callbacks, max_steps=1).train()


def test_another_adapter_is_active_at_the_end(bases, make_trainer, tmp_path):
    def switch(model, step):
        if step == 2:
            model.set_adapter("two")

    callbacks = [_When("on_step_end", switch), MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(adapted(bases["ours"], "two"), adapter=None, callbacks=callbacks)
    with pytest.raises(OutputError, match=r"safe in .*training was 'default', and .*\['two'\]"):
        trainer.train()
    trainer.model.set_adapter("default")  # and this one was saved
    saved = trainer.model.get_parameter(
        "base_model.model.model.layers.0.mlp.up_proj.qalora_B.default.weight"
    )
    kept = get_peft_model(load(bases["ours"]), config())
    kept.load_adapter(tmp_path / "run" / "adapter", "default")
    found = kept.get_parameter(
        "base_model.model.model.layers.0.mlp.up_proj.qalora_B.default.weight"
    )
    assert torch.equal(saved, found)


def test_interrupted_while_another_adapter_is_active(bases, make_trainer, tmp_path):
    """As within TRL's `use_adapter`, for the reference's log-probabilities."""

    def interrupt(model, step):
        if step == 1:
            model.set_adapter("two")
            raise KeyboardInterrupt

    callback = MergeCallback(tmp_path / "merged")
    callbacks = [_When("on_step_begin", interrupt), callback]
    model = adapted(bases["ours"], "two")
    trainer = make_trainer(model, adapter=None, callbacks=callbacks, **SAVED)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.merge_last_checkpoint() is not None
    verify_merge(tmp_path / "merged", tmp_path / "run" / "checkpoint-1", bases["ours"])


def test_adapter_that_another_callback_has_removed(bases, make_trainer, tmp_path):
    unload = _When("on_train_end", lambda model, step: model.merge_and_unload() and None)
    callbacks = [unload, MergeCallback(tmp_path / "merged")]
    with pytest.raises(ConfigError, match=r"'default' is gone from the model"):
        make_trainer(bases["ours"], callbacks=callbacks).train()
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_best_evaluation_between_two_saves_is_saved(bases, make_trainer, text_rows, tmp_path):
    settings = {**BEST, "save_steps": 2, "max_steps": 4, "eval_data": text_rows(4)}
    make_trainer(bases["ours"], **{**settings, "max_steps": 1, "save_steps": 1}).train()  # a relic
    options = {"dtype": "float32"}
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(
        bases["ours"],
        callbacks=callbacks,
        model_init_kwargs=options,
        learning_rate=1e-3,
        **settings,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert same(tmp_path / "merged", trainer.model)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_no_evaluation_that_gave_a_number(bases, make_trainer, text_rows, tmp_path, monkeypatch):
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(bases["ours"], callbacks=callbacks, eval_data=text_rows(4), **BEST)
    evaluate = trainer.evaluate
    monkeypatch.setattr(
        trainer, "evaluate", lambda *a, **k: evaluate(*a, **k) | {"eval_loss": float("nan")}
    )
    with pytest.raises(OutputError, match=r"safe in .*no evaluation gave a number"):
        trainer.train()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"of_a_later_release": 1}'])
def test_a_state_that_cannot_be_read_is_named(text, tmp_path):
    (tmp_path / "trainer_state.json").write_text(text)
    state = TrainerState(best_model_checkpoint=str(tmp_path), best_global_step=1, global_step=1)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: expected the state"):
        best_adapter(state, "default")


def test_best_checkpoint_of_a_run_that_was_moved(bases, make_trainer, text_rows, tmp_path):
    settings = {**BEST, "eval_data": text_rows(4), "model_init_kwargs": {"dtype": "float32"}}
    make_trainer(bases["ours"], run="old", **settings).train()
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = str(tmp_path / "new" / "checkpoint-2")
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(bases["ours"], run="b", callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=resumed)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-1")
    assert same(tmp_path / "merged", trainer.model)
    (tmp_path / "new" / "checkpoint-1").rename(tmp_path / "gone")
    callbacks = [MergeCallback(tmp_path / "again")]
    trainer = make_trainer(bases["ours"], run="c", callbacks=callbacks, **settings)
    with pytest.raises(ConfigError, match=r"checkpoint-1, the best .*is not there"):
        trainer.train(resume_from_checkpoint=resumed)


def test_a_checkpoint_of_another_training_is_not_the_best(bases, make_trainer, text_rows, tmp_path):
    """The Trainer takes any directory below output_dir that has the number of the best step."""
    settings = {**BEST, "eval_data": text_rows(4)}
    make_trainer(bases["ours"], run="a", **settings).train()
    make_trainer(
        bases["ours"], run="b", max_steps=1, learning_rate=1e-3, **settings | SAVED
    ).train()
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(bases["ours"], run="b", callbacks=callbacks, max_steps=3, **settings)
    with pytest.raises(OutputError, match=r"b/checkpoint-1 has the number .*another training"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert not (tmp_path / "merged").exists()


def test_resuming_with_another_scaling_or_on_another_base(bases, make_trainer, tmp_path):
    """PEFT loads the numbers alone; refused also without our callback."""
    make_trainer(bases["ours"], **SAVED).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    other = QALoRAConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"lora_alpha is 8, and 64 in this training"):
        make_trainer(bases["ours"], adapter=other, **SAVED).train(checkpoint)
    more = config(modules_to_save=["lm_head"])
    with pytest.raises(ConfigError, match=r"modules_to_save is None, and \['lm_head'\] in this"):
        make_trainer(bases["ours"], adapter=more, **SAVED).train(checkpoint)
    base = quantize_model(
        bases["dense"], tmp_path / "b", bits=3, group_size=32, method="rtn", progress=False
    )
    with pytest.raises(AdapterError, match=r"bits: the adapter belongs to a base with bits=4"):
        make_trainer(base.out, **SAVED).train(checkpoint)


def test_resuming_under_another_name(bases, make_trainer, tmp_path):
    """The Trainer would add the checkpoint's adapter, and train a new one."""
    model = get_peft_model(load(bases["ours"]), config(), adapter_name="tuned")
    make_trainer(model, adapter=None, **SAVED).train()
    with pytest.raises(ConfigError, match=r"found others of \['default', 'tuned'\] alone"):
        make_trainer(bases["ours"], **SAVED).train(str(tmp_path / "run" / "checkpoint-1"))


class _Averaging(torch.optim.SGD):
    """Trains some weights and evaluates others, as schedule-free optimizers do."""

    def __init__(self, parameters):
        self.held = list(parameters)
        super().__init__(self.held, lr=0.5)
        self.start = [parameter.detach().clone() for parameter in self.held]
        self.trained = None

    @torch.no_grad()
    def eval(self):
        if self.trained is None:
            self.trained = [parameter.clone() for parameter in self.held]
            for parameter, start in zip(self.held, self.start, strict=True):
                parameter.lerp_(start, 0.5)

    @torch.no_grad()
    def train(self):
        for parameter, trained in zip(self.held, self.trained or self.held, strict=True):
            parameter.copy_(trained)
        self.trained = None


def test_optimizer_that_evaluates_averaged_weights(bases, make_trainer, text_rows, tmp_path):
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(load(bases["ours"]), callbacks=callbacks, eval_data=text_rows(4))
    trainer.optimizer = _Averaging(p for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]  # what the log says, of the averages
    assert same(tmp_path / "merged", trainer.model)
    trainer.optimizer.train()
    assert not same(tmp_path / "merged", trainer.model) and loss > 0


def test_a_training_that_sigterm_has_stopped_is_not_merged(bases, make_trainer, tmp_path, caplog):
    def terminate(model, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    callbacks = [_When("on_step_end", terminate), MergeCallback(tmp_path / "merged")]
    trainer = make_trainer(
        bases["ours"], callbacks=callbacks, max_steps=9, enable_jit_checkpoint=True
    )
    jit = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager"))
    jit.jit_manager.kill_wait = 0.1
    trainer.train()
    assert trainer.state.global_step < 9
    assert "nothing is merged" in caplog.text and not (tmp_path / "merged").exists()
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_a_chat_template_of_an_earlier_training_is_not_inherited(
    bases, make_trainer, tokenizer, tmp_path
):
    for name, template in (("one", "{{ 'first' }}"), ("two", None)):
        trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(tmp_path / name)])
        trainer.processing_class.chat_template = template
        trainer.train()
        trainer.processing_class.chat_template = None
        assert Path(tmp_path / name / "chat_template.jinja").exists() == (template is not None)
