"""`MergeCallback` with the real SFTTrainer: every way in which a training ends."""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from qalora_plugin import (
    MergeCallback,
    QALoRAConfig,
    QALoRAQuantConfig,
    merge_adapter,
    quantize_model,
    verify_merge,
)
from qalora_plugin.checkpoint.base import open_quantized
from qalora_plugin.errors import ConfigError, OutputError
from qalora_plugin.ranks import on_main_process

IDS = torch.arange(5, 25)[None]


def _assert_same_model(merged: Path, trained: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, trained.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["ours", "stock", "dense"])
def test_model_as_path(
    kind: str, bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
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
    offsets_at: str, bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
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
def test_loaded_model(
    kind: str, bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
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


def test_whole_modules_beside_the_adapter(
    bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    config = QALoRAConfig(r=4, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    kwargs = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32), "dtype": "float32"}
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(
        bases["dense"], callbacks=[callback], adapter=config, model_init_kwargs=kwargs
    )
    trainer.train()
    assert callback.result is not None and callback.result.replaced == ["lm_head.weight"]
    _assert_same_model(tmp_path / "merged", trainer.model)


def test_packing_with_evaluation(
    bases: dict[str, Path],
    make_trainer: Callable[..., Any],
    text_rows: Callable[[int], Dataset],
    tmp_path: Path,
) -> None:
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


def test_completion_only_loss(
    bases: dict[str, Path], make_trainer: Callable[..., Any], pairs: Dataset, tmp_path: Path
) -> None:
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
    bases: dict[str, Path],
    make_trainer: Callable[..., Any],
    text_rows: Callable[[int], Dataset],
    tmp_path: Path,
) -> None:
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


def test_resumed_training_merges_what_an_uninterrupted_one_merges(
    bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make_trainer(
        bases["ours"], callbacks=[MergeCallback(tmp_path / "whole")], run="whole-run", **saving
    ).train()
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(tmp_path / "resumed")], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole-run" / "checkpoint-2"))
    whole, resumed = (open_quantized(tmp_path / name) for name in ("whole", "resumed"))
    for name in whole.layers:
        assert torch.equal(whole.layer(name).offsets, resumed.layer(name).offsets), name


class _Interrupt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_interrupted_training_merges_the_last_checkpoint(
    kind: str, bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
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


def test_nothing_saved_before_the_interrupt(
    bases: dict[str, Path],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(bases["ours"], callbacks=[callback, _Interrupt()], max_steps=5)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert callback.merge_last_checkpoint() is None
    assert "no checkpoint was saved" in caplog.text
    assert not (tmp_path / "merged").exists()


_SCRIPT = """
import sys
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from qalora_plugin import MergeCallback, QALoRAConfig

base, tokenizer, out = sys.argv[1:]
class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise KeyboardInterrupt
SFTTrainer(
    base,
    args=SFTConfig(output_dir=out + "/run", max_steps=2, save_steps=1, max_length=16,
                   per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to="none",
                   disable_tqdm=True),
    train_dataset=Dataset.from_dict({"text": ["one two three"] * 4}),
    processing_class=AutoTokenizer.from_pretrained(tokenizer),
    peft_config=QALoRAConfig(r=4),
    callbacks=[MergeCallback(out + "/merged"), Stop()],
).train()
"""


def test_a_script_that_is_interrupted_merges_when_it_exits(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [str(bases["ours"]), str(bases["stock"]), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "merging the last saved checkpoint" in done.stderr
    verify_merge(tmp_path / "merged", tmp_path / "run" / "checkpoint-1", bases["ours"])


class _Crash(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise RuntimeError("out of memory")


def test_a_script_that_crashed_does_not_merge_when_it_exits(
    bases: dict[str, Path],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_exit: list[tuple[Any, ...]] = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    callback = MergeCallback(tmp_path / "merged")
    trainer = make_trainer(
        bases["ours"], callbacks=[callback, _Crash()], save_strategy="steps", save_steps=1
    )
    with pytest.raises(RuntimeError) as crash:
        trainer.train()
    monkeypatch.setattr(sys, "last_value", crash.value, raising=False)  # as the interpreter does
    [(function, *arguments)] = at_exit
    function(*arguments)
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr(sys, "last_value", KeyboardInterrupt(), raising=False)
    function(*arguments)
    assert (tmp_path / "merged").exists()


class _FillTarget(TrainerCallback):
    """Somebody else writes to the target while training runs."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.target.mkdir(exist_ok=True)
        (self.target / "precious").write_text("x")


def test_a_merge_that_fails_says_where_the_adapter_is(
    bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    target = tmp_path / "merged"
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(target), _FillTarget(target)])
    with pytest.raises(OutputError, match=r"adapter is safe in .*run/adapter, .* is not empty"):
        trainer.train()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert [path.name for path in target.iterdir()] == ["precious"]
    with pytest.raises(OutputError, match="is not empty"):  # before training, this time
        trainer.train()


def test_refused_before_training(
    bases: dict[str, Path], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
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


def _rank(rank: int, store: str, messages: Any) -> None:
    def work() -> None:
        raise ValueError("the disk is full")

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    try:
        on_main_process(work, "merging", "not merged")
    except OutputError as error:
        messages.put(str(error))
    torch.distributed.destroy_process_group()


def test_other_processes_fail_with_the_main_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")  # importing everything again would take long
    messages = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "store"), messages))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    assert [messages.get(timeout=60) for _ in ranks] == ["not merged: the disk is full"] * 2
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
