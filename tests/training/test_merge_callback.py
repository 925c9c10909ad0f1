"""`MergeCallback` with the real SFTTrainer: what it merges, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qalora_plugin import (
    MergeCallback,
    QALoRAConfig,
    QALoRAQuantConfig,
    merge_adapter,
    quantize_model,
    verify_merge,
)
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import ConfigError, OutputError

IDS = torch.arange(5, 25)[None]


def _assert_same_model(merged, trained):
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, trained.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["ours", "stock", "dense"])
def test_model_as_path(kind, bases, make_trainer, tmp_path):
    kwargs: dict[str, Any] = {"dtype": "float32"}
    if kind == "dense":
        kwargs["quantization_config"] = QALoRAQuantConfig(bits=4, group_size=32)
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(bases[kind], callbacks=[callback], model_init_kwargs=kwargs)
    trainer.train()
    _assert_same_model(tmp_path / "merged", trainer.model)
    assert callback.result is not None and callback.result.layers == 14
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "qalora_manifest.json"} <= files
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_cache"] is True
    if kind != "dense":
        report = verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter", bases[kind])
        assert report.output_change > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


@pytest.mark.parametrize("offsets_at", ["middle", "minimum"])
def test_base_that_was_quantized_while_loading_can_be_written_down_later(
    offsets_at, bases, make_trainer, tmp_path
):
    grid: dict[str, Any] = {"bits": 3, "group_size": 16, "offsets_at": offsets_at}
    kwargs = {"quantization_config": QALoRAQuantConfig(**grid), "dtype": "float32"}
    trainer = make_trainer(
        bases["dense"], callbacks=[MergeCallback(tmp_path / "merged")], model_init_kwargs=kwargs
    )
    trainer.train()
    # as the error says that `merge` gives for such an adapter; bf16 embeddings stay bf16
    adapter, base = tmp_path / "run" / "adapter", tmp_path / "base"
    quantize_model(bases["dense"], base, method="rtn", progress=False, **grid)
    assert open_quantized(tmp_path / "merged").config.offsets_at == offsets_at
    _assert_same_model(tmp_path / "merged", trainer.model)
    assert verify_merge(tmp_path / "merged", adapter, base).layers == 14
    assert merge_adapter(adapter, tmp_path / "again", base).layers == 14


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_loaded_model(kind, bases, make_trainer, tmp_path):
    config = {"quantization_config": QALoRAQuantConfig(bits=3, group_size=16)}
    model = AutoModelForCausalLM.from_pretrained(
        bases[kind], dtype=torch.float32, **(config if kind == "dense" else {})
    )
    trainer = make_trainer(
        model, callbacks=[MergeCallback(tmp_path / "merged")], gradient_checkpointing=True
    )
    trainer.train()
    _assert_same_model(tmp_path / "merged", trainer.model)
    assert open_quantized(tmp_path / "merged").config.bits == (3 if kind == "dense" else 4)


def test_whole_modules_beside_the_adapter(bases, make_trainer, tmp_path):
    config = QALoRAConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    kwargs = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32), "dtype": "float32"}
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(
        bases["dense"], callbacks=[callback], adapter=config, model_init_kwargs=kwargs
    )
    trainer.train()
    assert callback.result is not None and callback.result.replaced == ["lm_head.weight"]
    _assert_same_model(tmp_path / "merged", trainer.model)


class _MergeInMemory(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        kwargs["model"].merge_adapter()


def test_what_is_merged_in_memory_is_not_merged_twice(bases, make_trainer, tmp_path):
    """An on-the-fly base is written from memory: without the adapter that is merged there."""
    kwargs = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32), "dtype": "float32"}
    trainer = make_trainer(
        bases["dense"],
        callbacks=[_MergeInMemory(), MergeCallback(tmp_path / "merged")],
        model_init_kwargs=kwargs,
    )
    trainer.train()
    layer = trainer.model.base_model.model.model.layers[0].mlp.down_proj
    assert layer.merged_adapters == ["default"]  # as the callback left it
    _assert_same_model(tmp_path / "merged", trainer.model)
    verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter", bases["ours"])


def test_second_adapter_on_a_model_merged_in_memory(bases, make_trainer, tmp_path):
    """The directory that the model came from is not the second adapter's base."""
    model = AutoModelForCausalLM.from_pretrained(bases["ours"], dtype=torch.float32)
    config = QALoRAConfig(r=4, init_lora_weights=False, lora_alpha=1, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).merge_and_unload()
    trainer = make_trainer(model, callbacks=[MergeCallback(tmp_path / "merged")])
    trainer.train()
    _assert_same_model(tmp_path / "merged", trainer.model)
    assert open_quantized(tmp_path / "merged").config.merged["base_merged"]["lora_alpha"] == 1


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_generation_config_that_transformers_refuses_to_save(kind, bases, make_trainer, tmp_path):
    """from_pretrained takes it with a warning, so it must not fail after the training."""
    stored = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 2}
    base = shutil.copytree(bases[kind], tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(stored))
    kwargs: dict[str, Any] = {"dtype": "float32"}
    if kind == "dense":
        kwargs["quantization_config"] = QALoRAQuantConfig(bits=4, group_size=32)
    callback = MergeCallback(tmp_path / "merged")
    make_trainer(base, callbacks=[callback], model_init_kwargs=kwargs).train()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.generation_config.temperature == 0.6
    assert not merged.generation_config.do_sample


def test_packing_with_evaluation(
    bases,
    make_trainer,
    text_rows,
    tmp_path,
):
    trainer = make_trainer(
        bases["ours"],
        callbacks=[MergeCallback(tmp_path / "merged")],
        eval_data=text_rows(4),
        packing=True,
        packing_strategy="wrapped",
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    _assert_same_model(tmp_path / "merged", trainer.model)


def test_completion_only_loss(bases, make_trainer, pairs, tmp_path):
    trainer = make_trainer(
        bases["ours"],
        data=pairs,
        callbacks=[MergeCallback(tmp_path / "merged")],
        completion_only_loss=True,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any() and (batch["labels"] != -100).any()
    trainer.train()
    _assert_same_model(tmp_path / "merged", trainer.model)


def test_early_stopping_merges_the_best_adapter(
    bases,
    make_trainer,
    text_rows,
    tmp_path,
):
    trainer = make_trainer(
        bases["ours"],
        callbacks=[MergeCallback(tmp_path / "merged"), EarlyStoppingCallback(1)],
        eval_data=text_rows(4),
        max_steps=20,
        learning_rate=1.0,  # diverges: an early checkpoint is the best
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    last = tmp_path / "run" / f"checkpoint-{trainer.state.global_step}"
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.state.global_step < 20 and best != last
    verify_merge(tmp_path / "merged", best)
    _assert_same_model(tmp_path / "merged", trainer.model)


def test_resumed_training_merges_what_an_uninterrupted_one_merges(bases, make_trainer, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(
        bases["ours"], callbacks=[MergeCallback(tmp_path / "whole")], run="whole-run", **saving
    ).train()
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(tmp_path / "resumed")], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole-run" / "checkpoint-2"))
    whole, resumed = (open_quantized(tmp_path / name) for name in ("whole", "resumed"))
    for name in whole.layers:
        assert torch.equal(whole.layer(name).offsets, resumed.layer(name).offsets), name


class _FillTarget(TrainerCallback):
    """Somebody else writes to the target while training runs."""

    def __init__(self, target):
        self.target = target

    def on_step_end(self, args, state, control, **kwargs):
        self.target.mkdir(exist_ok=True)
        (self.target / "precious").write_text("x")


def test_a_merge_that_fails_says_where_the_adapter_is(bases, make_trainer, tmp_path):
    target = tmp_path / "merged"
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(target), _FillTarget(target)])
    with pytest.raises(OutputError, match=r"adapter is safe in .*run/adapter, .* is not empty"):
        trainer.train()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert [path.name for path in target.iterdir()] == ["precious"]
    with pytest.raises(OutputError, match="is not empty"):  # before training, this time
        trainer.train()


def test_refused_before_training(bases, make_trainer, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        MergeCallback(tmp_path / "full")
    lora = make_trainer(
        bases["dense"],
        callbacks=[MergeCallback(tmp_path / "merged")],
        adapter=LoraConfig(r=4, task_type="CAUSAL_LM"),
    )
    with pytest.raises(ConfigError, match="found the PEFT method LORA"):
        lora.train()


@pytest.mark.parametrize("out", ["run", "run/adapter", "."])
def test_target_that_the_training_fills_is_refused_before_it_starts(
    out, bases, make_trainer, tmp_path
):
    callback = MergeCallback(tmp_path / "here" / out)
    trainer = make_trainer(bases["ours"], callbacks=[callback], run="here/run", save_steps=1)
    with pytest.raises(ConfigError, match=r"is where the training writes .*run/merged"):
        trainer.train()
    assert not list((tmp_path / "here" / "run").glob("*"))


def test_target_below_the_home_directory(
    bases,
    make_trainer,
    tmp_path,
    monkeypatch,
):
    """Also the temporary base; a later change of the working directory does not move them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    kwargs = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32)}
    callback = MergeCallback("~/models/merged")
    trainer = make_trainer(bases["dense"], callbacks=[callback], model_init_kwargs=kwargs)
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.train()
    assert callback.result is not None
    assert callback.result.out == tmp_path / "home" / "models" / "merged"
    assert [path.name for path in callback.result.out.parent.iterdir()] == ["merged"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("sharded", [False, True])
def test_base_from_memory_is_where_the_next_run_cleans_up(
    bases,
    make_trainer,
    tmp_path,
    monkeypatch,
    sharded,
):
    """A killed merge leaves the whole base behind: AtomicDirectory removes siblings so named, but
    not this one while it is in use. With sharded parameters the base is quantized again."""
    if sharded:
        monkeypatch.setattr("qalora_plugin.training.save.is_sharded", lambda tensor: True)
    found: list[Path] = []

    def look(adapter, out, base, **options):
        found.extend(out.parent.glob(f".{out.name}.partial-scratch-*"))
        assert found == [base.parent]
        return merge_adapter(adapter, out, base, **options)

    monkeypatch.setattr("qalora_plugin.training.callback.merge_adapter", look)
    kwargs = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32)}
    callback = MergeCallback(tmp_path / "merged")
    make_trainer(bases["dense"], callbacks=[callback], model_init_kwargs=kwargs).train()
    assert callback.result is not None and not found[0].exists()


def test_classifier_keeps_its_labels(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        bases["ours"],
        dtype=torch.float32,
        id2label={0: "bad", 1: "fair", 2: "good"},
        label2id={"bad": 0, "fair": 1, "good": 2},
        pad_token_id=3,
    )
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(
        get_peft_model(model, QALoRAConfig(r=2, task_type="SEQ_CLS")),
        arguments,
        train_dataset=[{"input_ids": [5, 6, 7], "labels": i} for i in range(3)],
        callbacks=[MergeCallback(tmp_path / "merged")],
    ).train()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert merged.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert (merged.config.pad_token_id, merged.config.problem_type) == (
        3,
        "single_label_classification",
    )
    verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter", bases["ours"], logits=True)


def test_merging_the_saved_adapter_again_gives_the_same_directory(
    bases, make_trainer, tokenizer, tmp_path
):
    """`qalora merge` of what the callback or a checkpoint saved inherits what the callback did."""
    end = tokenizer.convert_ids_to_tokens(40)
    base = shutil.copytree(bases["ours"], tmp_path / "base")
    (base / "chat_template.jinja").write_text("the base's")
    trainer = make_trainer(
        base,
        callbacks=[MergeCallback(tmp_path / "merged")],
        model_init_kwargs={"dtype": "float32"},
        eos_token=end,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    stored = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert trainer.processing_class.convert_tokens_to_ids(end) in stored["eos_token_id"]
    for name in ("adapter", "checkpoint-2"):
        again = merge_adapter(tmp_path / "run" / name, tmp_path / f"from-{name}", base).out
        names = {path.name for path in again.iterdir()}
        assert names == {path.name for path in (tmp_path / "merged").iterdir()}
        for path in again.glob("*.j*"):  # chat template, tokenizer, generation config
            if path.name not in ("config.json", "qalora_manifest.json"):
                merged = tmp_path / "merged" / path.name
                assert path.read_bytes() == merged.read_bytes(), path.name
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()  # the tokenizer has none


@pytest.mark.parametrize("name", ["default", "own"])
def test_the_best_adapter_is_merged_or_nothing(name, bases, make_trainer, text_rows, tmp_path):
    """The Trainer finds the best adapter only if it is called "default", and warns otherwise."""
    model = AutoModelForCausalLM.from_pretrained(bases["ours"], dtype=torch.float32)
    config = QALoRAConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = make_trainer(
        get_peft_model(model, config, adapter_name=name),
        adapter=None,
        eval_data=text_rows(4),
        callbacks=[MergeCallback(tmp_path / "merged")],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        greater_is_better=True,  # the first, then
        metric_for_best_model="eval_loss",
        load_best_model_at_end=True,
    )
    if name == "default":
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
        _assert_same_model(tmp_path / "merged", trainer.model)
        return
    with pytest.raises(OutputError, match=r"qalora merge .*checkpoint-1/own"):
        trainer.train()
    assert not (tmp_path / "merged").exists()
