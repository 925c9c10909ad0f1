"""`MergeCallback`: the merged INT-n checkpoint at the end of a TRL or transformers training."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.format import format_named
from ..distributed.ranks import connect, on_main_process
from ..distributed.sharding import fsdp_enabled
from ..errors import ConfigError
from ..files.atomic import AtomicDirectory, ScratchDirectory, check_target, hold
from ..files.names import ADAPTER_WEIGHTS_FILE
from ..formats.export import ExportResult, check_format, export_model, export_path
from ..merge.merge import MergeResult, merge_adapter
from ..report.page import try_report
from ..tuner.config import PEFT_TYPE
from .resume import check_policy, resumed_checkpoint
from .save import (
    adapter_directory,
    check_head,
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

    A training that is interrupted (Ctrl-C, a notebook's stop button) merges nothing: call
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
        self.formats = [format_named(name).name for name in formats]
        self.push_to_hub = push_to_hub
        self.repo_id = repo_id
        self.private = private
        self.report = report
        self.result: MergeResult | None = None
        """Says what was written; None before."""
        self.exported: list[ExportResult] = []
        """Says what was written in other formats."""
        self._model: PeftModel | None = None
        self._processing_class: Any = None
        self._data: str | None = None
        self._state: TrainerState | None = None
        self._load_best = False
        self._started = time.monotonic()
        self._last_checkpoint: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there is something to merge, before hours of training.

        Raises:
            ConfigError: the model has no QALORA adapter, or a frozen one, or a random head that
                nothing saves; the training writes to the target, or goes on with another adapter
                than was saved.
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
        _check_adapter(model)
        self._model, self._state = model, state
        check_head(model)
        base = quantized_base_on_disk(model) if self.formats else None
        for name in self.formats:
            if base is not None:
                check_format(base, name)
            check_target(export_path(self.out_dir, name, base))
        self._last_checkpoint = resumed_checkpoint(model, args, state)
        check_policy(model, state, self._last_checkpoint)
        self._processing_class = kwargs.get("processing_class")
        dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
        self._data = getattr(getattr(dataset, "info", None), "dataset_name", None)
        self._load_best = args.load_best_model_at_end
        self._started = time.monotonic()
        connect()

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
            save_adapter(self._model, self._last_checkpoint)
        if state.is_world_process_zero:
            self._save_beside(adapter_directory(self._model, self._last_checkpoint))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter, merge it, and push.

        Raises:
            OutputError: the merge failed, on every process; the message says where the adapter is.
            RankError: the main process has died.
        """
        assert self._model is not None
        adapter = save_adapter(self._model, Path(args.output_dir) / ADAPTER_DIR)
        failed = (
            f"the trained adapter is safe in {adapter}, but merging it failed (repeat with "
            f"`qalora merge {adapter} --out DIR`)"
        )
        on_main_process(lambda: self._check_best(adapter), "looking for the best adapter", failed)
        on_main_process(lambda: self._save_beside(adapter), "saving the tokenizer", failed)
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
        checkpoint = self._last_checkpoint
        if self._load_best and self._state.best_model_checkpoint:
            checkpoint = Path(self._state.best_model_checkpoint)
        adapter = adapter_directory(self._model, checkpoint)
        self._merge(adapter)
        self._export(adapter)
        self._push()
        return self.result

    def _check_best(self, adapter: Path) -> None:
        """Refuse to merge another adapter than the best one, where that was asked for.

        The Trainer only warns where it does not find the best adapter, as of one that is not called
        "default", and goes on with the last one.
        """
        best = self._state.best_model_checkpoint if self._state is not None else None
        if not self._load_best or best is None or self._model is None:
            return
        kept = adapter_directory(self._model, Path(best)) / ADAPTER_WEIGHTS_FILE
        if not kept.exists():  # FSDP's own shards: nothing to compare with
            return
        found, wanted = load_file(adapter / ADAPTER_WEIGHTS_FILE), load_file(kept)
        same = found.keys() == wanted.keys() and all(
            torch.equal(found[key].float(), wanted[key].float()) for key in found
        )
        if not same:
            raise ConfigError(
                f"load_best_model_at_end: the Trainer was to load the best adapter, {kept}, but "
                "holds another one. Merge the best one with "
                f"`qalora merge {kept.parent} --out {self.out_dir}`"
            )

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

    def _finish(self, partial: Path) -> None:
        """Write labels as they are in this training."""
        assert self._model is not None
        write_head_config(self._model.get_base_model(), partial)

    def _save_beside(self, adapter: Path) -> None:
        """Write tokenizer and generation config beside an adapter, which a merge then takes."""
        assert self._model is not None
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


def _check_adapter(model: Any) -> None:
    """Refuse a model that has no QALORA adapter, or trains nothing.

    Raises:
        ConfigError: see above.
    """
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind != PEFT_TYPE:
        found = "no adapter" if kind is None else f"the PEFT method {kind.value}"
        raise ConfigError(
            f"MergeCallback: expected a model with a QALORA adapter, found {found}. "
            "Give SFTTrainer peft_config=QALoRAConfig(...)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "MergeCallback: no parameter is trainable: the adapter was loaded for inference. Load "
            "it with PeftModel.from_pretrained(base, ADAPTER, is_trainable=True)"
        )
