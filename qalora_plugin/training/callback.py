"""`MergeCallback`: the merged INT-n checkpoint at the end of a TRL or transformers training."""

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.format import format_named
from ..distributed.ranks import connect, on_main_process
from ..distributed.sharding import fsdp_enabled
from ..errors import ConfigError
from ..files.atomic import (
    AtomicDirectory,
    ScratchDirectory,
    check_target,
    hold,
    saved_by_others,
)
from ..formats.export import (
    ExportResult,
    check_format,
    export_format,
    export_model,
    export_path,
)
from ..merge.inherit import remove_inherited
from ..merge.merge import MergeResult, merge_adapter
from ..report.page import try_report
from ..tuner import resuming
from ..tuner.resuming import adapter_directory
from .best import best_adapter, check_best, save_if_best, take_average
from .checks import check_all_is_saved, check_base, check_head, has_adapter, trained_adapter
from .resume import check_resumed
from .save import (
    check_savable,
    quantized_base_on_disk,
    save_adapter,
    save_base,
    write_generation_config,
    write_head_config,
)

ADAPTER_DIR = "adapter"
_log = logging.getLogger(__name__)


class MergeCallback(TrainerCallback):
    """Writes the merged checkpoint when training ends, with tokenizer and generation config.

        SFTTrainer(..., peft_config=QALoRAConfig(r=64), callbacks=[MergeCallback("out/merged")])

    "Ends" is the last step, `max_steps`, or early stopping; with `load_best_model_at_end` the best
    adapter is merged. The adapter itself is saved first, to `<output_dir>/adapter`: if the merge
    fails, nothing is lost. Of several processes the main one writes and the others wait.

    Give it last in `callbacks`: what a later one does to the weights at the end (averages, say)
    comes after the merge.

    A training that is interrupted (Ctrl-C, a notebook's stop button, SIGTERM) merges nothing: call
    `merge_last_checkpoint()` then, or run `qalora merge` on a checkpoint.

    The base is a quantized one on disk, ours or stock GPTQ, or a 16-bit one that was quantized
    while it loaded: then its integers are taken from memory.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        formats: Sequence[str] = (),
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool = True,
        report: bool = True,
    ) -> None:
        """Check the target; nothing is written yet.

        Args:
            out_dir: directory to make. It must not exist, or be empty.
            formats: exports of the merged checkpoint to write beside it, to out_dir-FORMAT (a
                format that is one file: out_dir.SUFFIX). "original" is the file that the base
                came in, with the adapter in it.
            push_to_hub: also push the merged checkpoint, with a model card.
            repo_id: where to: `name` or `org/name`; by default the directory's name.
            private: whether a repository that has to be made is private.
            report: write report.html and report.json into the training's output_dir.

        Raises:
            OutputError: the target is not empty, or cannot be written.
            ConfigError: no such format.
        """
        self.out_dir = AtomicDirectory(out_dir).target
        self.formats = [export_format(name).name for name in formats]
        self.push_to_hub = push_to_hub
        self.repo_id = repo_id
        self.private = private
        self.report = report
        self.result: MergeResult | None = None
        """Says what was written; None before."""
        self.exported: list[ExportResult] = []
        """Says what was written in other formats."""
        resuming.install()
        self._model: PeftModel | None = None
        self._adapter = "default"
        self._processing_class: Any = None
        self._data: str | None = None
        self._state: TrainerState | None = None
        self._load_best = False
        self._started = time.monotonic()
        self._last_checkpoint: Path | None = None
        self._training = self._terminated = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there is something to merge, before hours of training.

        Raises:
            ConfigError: the model has no QALORA adapter, or a frozen one, or several active ones, a
                random head or trained parameters that nothing saves, or a base that was changed in
                memory; the training writes to the target, is one of a search for hyperparameters,
                or goes on with another adapter than was saved.
            AdapterError: it goes on with an adapter of another base.
            OutputError: the target has been filled since, or another training has this output_dir.
            CheckpointError: a format cannot hold the base, or has no file to go back to.
            RankError: the processes cannot reach each other, as the merge will need.
        """
        adapter = Path(args.output_dir).resolve() / ADAPTER_DIR
        if adapter.is_relative_to(self.out_dir):
            raise ConfigError(
                f"MergeCallback: {self.out_dir} is where the training writes (its output_dir is "
                f"{args.output_dir}, the adapter goes to {adapter}). Name another directory, such "
                f"as {adapter.with_name('merged')}"
            )
        AtomicDirectory(self.out_dir)
        if state.is_world_process_zero:
            hold(args.output_dir)
        model = kwargs["model"]
        if state.is_hyper_param_search:
            raise ConfigError(
                "MergeCallback: a search for hyperparameters trains many models, and there is one "
                "directory. Leave it out of the search, and train the best trial again with it"
            )
        if self._training and self._state is not None and self._state.global_step:
            _log.warning(
                "MergeCallback: the training begins again with weights that %d steps have trained, "
                "which its log will not show (auto_find_batch_size, or an interrupted one)",
                self._state.global_step,
            )
        self._adapter = trained_adapter(model)
        self._model, self._state = model, state
        check_head(model)
        check_all_is_saved(model, self._adapter)
        check_base(model)
        check_savable(model)
        base = quantized_base_on_disk(model) if self.formats else None
        for name in self.formats:
            check_format(base, name, model.peft_config[self._adapter].adapt)
            check_target(export_path(self.out_dir, name, base))
        self._last_checkpoint = check_resumed(model, self._adapter, args, state)
        self._processing_class = kwargs.get("processing_class")
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        self._data = getattr(getattr(dataset, "info", None), "dataset_name", None)
        self._load_best = args.load_best_model_at_end
        self._started = time.monotonic()
        self._watch_sigterm(args)
        connect()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With `load_best_model_at_end` have the best model so far saved, whatever `save_steps`."""
        if self._training:
            save_if_best(args, state, control, kwargs.get("metrics") or {})

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the checkpoint, for `merge_last_checkpoint`.

        Under FSDP the Trainer saves shards alone: the adapter is put beside them.
        """
        self._last_checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._model is None:
            return
        if fsdp_enabled():
            save_adapter(self._model, self._last_checkpoint, self._adapter)
        if state.is_world_process_zero:
            self._save_beside(adapter_directory(self._adapter, self._last_checkpoint))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter, merge it, and push.

        Raises:
            OutputError: the merge failed, on every process; the message says where the adapter is.
            RankError: the main process has died.
        """
        assert self._model is not None
        self._training = False
        if self._terminated and state.global_step < state.max_steps:
            _log.warning(
                "MergeCallback: SIGTERM has stopped the training at step %d of %d, nothing is "
                "merged. Resume it from the checkpoint that the Trainer has saved",
                *(state.global_step, state.max_steps),
            )
            return
        if not has_adapter(self._model, self._adapter):
            raise ConfigError(
                f"MergeCallback: the adapter {self._adapter!r} is gone from the model: another "
                "callback has called merge_and_unload() or delete_adapter(). Leave that out, and "
                "merge a checkpoint of this training with `qalora merge`"
            )
        take_average(args, state, kwargs.get("optimizer"))
        adapter = save_adapter(self._model, Path(args.output_dir) / ADAPTER_DIR, self._adapter)
        failed = (
            f"the trained adapter is safe in {adapter}, but merging it failed (repeat with "
            f"`qalora merge {adapter} --out DIR`)"
        )
        on_main_process(lambda: self._check_end(adapter), "looking for the best adapter", failed)
        on_main_process(lambda: self._save_beside(adapter, True), "saving the tokenizer", failed)
        on_main_process(lambda: self._merge(adapter), "merging", failed)
        if self.formats:
            failed = f"merged into {self.out_dir}, but not exported"
            on_main_process(lambda: self._export(adapter), "exporting", failed)
        if self.report:
            given = {
                "merged": self.out_dir,
                "history": state.log_history,
                "seconds": {"train": time.monotonic() - self._started},
            }
            failed = f"merged into {self.out_dir}, but no report was written"
            on_main_process(lambda: try_report(args.output_dir, **given), "reporting", failed)
        on_main_process(self._push, "pushing", f"merged into {self.out_dir}, but not pushed")

    def merge_last_checkpoint(self) -> MergeResult | None:
        """Merge the last checkpoint of a training that was interrupted; call it in one process.

        That is the newest that the Trainer saved or resumed from, or the best one with
        `load_best_model_at_end`.

        Returns:
            What was written; None, with a warning, where no checkpoint had been saved.

        Raises:
            QALoRAError: the merge failed; the message says why.
        """
        if self._model is None or self._state is None or self._last_checkpoint is None:
            _log.warning("MergeCallback: no checkpoint was saved, there is nothing to merge")
            return None
        best = best_adapter(self._state, self._adapter) if self._load_best else None
        adapter = best or adapter_directory(self._adapter, self._last_checkpoint)
        self._merge(adapter)
        self._export(adapter)
        self._push()
        return self.result

    def _check_end(self, adapter: Path) -> None:
        """Refuse another adapter than was trained, or than the best one, and another base."""
        assert self._model is not None and self._state is not None
        active = list(self._model.active_adapters)
        if active != [self._adapter]:
            raise ConfigError(
                f"the adapter in training was {self._adapter!r}, and at its end {active} is "
                "active: it is not clear which one is to be merged"
            )
        check_all_is_saved(self._model, self._adapter)
        check_base(self._model)
        if self._load_best:
            check_best(self._state, self._adapter, adapter)

    def _merge(self, adapter: Path) -> None:
        assert self._model is not None
        with _base_directory(self._model, self.out_dir) as base:
            self.result = merge_adapter(adapter, self.out_dir, base, finish=self._finish)
        _log.info("merged checkpoint: %s", self.result.out)

    def _export(self, adapter: Path) -> None:
        assert self._model is not None
        for name in self.formats:
            path = export_path(self.out_dir, name, quantized_base_on_disk(self._model))
            source = adapter if format_named(name).of_adapter else self.out_dir
            self.exported.append(export_model(source, path, name))
            _log.info("%s", self.exported[-1].as_text())

    def _push(self) -> None:
        if self.push_to_hub and self.result is not None and self._state is not None:
            from ..hub.push import push_merged

            push_merged(
                self.result.out,
                self.repo_id or self.out_dir.name,
                private=self.private,
                data=self._data,
                log_history=self._state.log_history,
            )

    def _watch_sigterm(self, args: TrainingArguments) -> None:
        """Remember a SIGTERM, at which the Trainer's own handler ends the training as if whole."""
        self._training, self._terminated = True, False
        if not args.enable_jit_checkpoint:
            return
        before = signal.getsignal(signal.SIGTERM)

        def note(number: int, frame: Any) -> None:
            self._terminated = True
            if callable(before):
                before(number, frame)

        signal.signal(signal.SIGTERM, note)

    def _finish(self, partial: Path) -> None:
        """Write labels as they are in this training."""
        assert self._model is not None
        write_head_config(self._model.get_base_model(), partial)

    def _save_beside(self, adapter: Path, alone: bool = False) -> None:
        """Write tokenizer and generation config beside an adapter, which a merge then takes.

        With `alone`, what an earlier training has left there of these goes first.
        """
        assert self._model is not None
        if alone:
            remove_inherited(adapter)
        with saved_by_others(adapter):
            if self._processing_class is not None:
                self._processing_class.save_pretrained(adapter)
            write_generation_config(self._model.get_base_model(), adapter)


@contextmanager
def _base_directory(model: PeftModel, out_dir: Path) -> Iterator[Path]:
    """Give the quantized base on disk: what was loaded, or a temporary copy from memory."""
    found = quantized_base_on_disk(model)
    if found is not None:
        yield found
        return
    with ScratchDirectory(out_dir) as scratch:
        base = scratch / "base"
        save_base(model, base)
        yield base
