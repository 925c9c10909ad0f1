"""The plugin: Axolotl's hooks, in the order in which a training run calls them."""

import logging
from pathlib import Path
from typing import Any

from accelerate import accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerState

from ..distributed.ranks import connect, on_main_process, rank
from ..errors import ConfigError
from ..files.atomic import hold
from ..files.hub import locate, resolve_model_dir
from ..files.json import read_json
from ..files.names import ADAPTER_CONFIG_FILE
from ..hf.one_file import directory_of
from ..report.page import try_report
from ..training.best import check_best, save_if_best, take_average
from ..training.checks import check_base as check_loaded_base
from ..training.checks import check_head
from ..training.figures import FiguresCallback
from ..training.resume import check_resumed
from ..tuner import QALoRAConfig
from .base import check_base, check_calibration, is_quantized, quantized_base
from .checks import ADAPTER, check_best_is_kept, check_config
from .finish import (
    check_formats,
    check_free,
    drop_torn_checkpoint,
    export,
    merge,
    merged_before,
    merged_dir,
    push,
)
from .rates import set_scale_rate

LOG = logging.getLogger(__name__)
_SET_BY_AXOLOTL = ("max_position_embeddings",)  # to a longer sequence_len, once the model is made


class QALoRAPlugin(BasePlugin):
    """Quantizes the base before training, adapts it, and writes the merged model after."""

    def __init__(self) -> None:
        super().__init__()
        self._watch = _Watch({})

    def get_input_args(self) -> str:
        """Return the dotted name of the pydantic model of our keys."""
        return "qalora_plugin.axolotl.QALoRAArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Declare `adapter: qalora`, which Axolotl's own LoRA loader never loads."""
        return [AdapterCapabilities(name=ADAPTER, lora_like=False, relora=False)]

    def register(self, cfg: Any) -> None:
        """Refuse what cannot work and find the base; the first hook, before validation.

        Raises:
            ConfigError: a key that contradicts `adapter: qalora`.
            CheckpointError: the base cannot be read.
            SystemExit: merge-lora finds that training has merged this adapter already.
        """
        check_config(cfg)
        if cfg.get("adapter") != ADAPTER:
            return
        _import_file(cfg)
        check_base(cfg.get("base_model"))
        if cfg.get("merge_lora"):
            # the other method copies a quantized base unmerged; this one asks pre_model_load
            cfg["merge_method"] = "legacy"
        adapter = _adapter_directory(cfg)
        if adapter is not None:
            # evaluate, inference, merge-lora: the base is the one that the adapter was trained on
            _use_base(cfg, _base_of(adapter) or cfg["base_model"])
        done = (
            merged_before(cfg, adapter) if adapter is not None and cfg.get("merge_lora") else None
        )
        if done is not None:
            print(done)
            raise SystemExit(0)

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Load Axolotl's data sets before training, and quantize a 16-bit base on their text."""
        if cfg.adapter != ADAPTER or preprocess:
            return None
        check_free(cfg)
        if rank() == 0:
            hold(cfg["output_dir"])
        drop_torn_checkpoint(cfg)
        connect()  # now: the process group is gone when rank 0 merges
        if is_quantized(cfg.base_model, cfg.revision_of_model):
            check_formats(cfg, resolve_model_dir(cfg.base_model, cfg.revision_of_model))
            return None
        check_calibration(cfg)
        check_formats(cfg, None)
        from axolotl.common.datasets import load_datasets, load_preference_datasets
        from axolotl.loaders import load_tokenizer

        meta = load_preference_datasets(cfg=cfg) if cfg.rl else load_datasets(cfg=cfg)
        tokenizer = load_tokenizer(cfg)
        directory = quantized_base(cfg, meta.train_dataset, lambda text: tokenizer(text).input_ids)
        LOG.info("qalora: quantized base in %s", directory)
        check_formats(cfg, directory)
        _use_base(cfg, str(directory))
        return meta

    def pre_model_load(self, cfg: Any) -> None:
        """Merge for `axolotl merge-lora`; for other verbs check that the base is quantized.

        Raises:
            ConfigError: the base is still a 16-bit model: only training quantizes; or a key of the
                scales' learning rate cannot be served.
            SystemExit: merge-lora is done. It would go on to build the model and save it in place;
                ours streams tensors, and a merged directory is there whole or not at all.
        """
        if cfg.adapter != ADAPTER:
            return
        if cfg.merge_lora:
            adapter = _adapter_directory(cfg) or Path(cfg.output_dir)
            merge(cfg, adapter)
            _export(cfg, adapter)
            raise SystemExit(0)
        if not is_quantized(cfg.base_model, cfg.revision_of_model):
            raise ConfigError(
                f"base_model: {cfg.base_model} is a 16-bit model, and only `axolotl train` "
                "quantizes it. Set lora_model_dir to a trained adapter (its base is then used), "
                "or base_model to a directory written by `qalora quantize`"
            )
        set_scale_rate(cfg)
        if cfg.fsdp_config:
            # as in TRL: Axolotl has put code of its own in its place, made for its own adapters
            accelerator.fsdp2_prepare_model = fsdp2_prepare_model

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig | None] | None:
        """Return the PEFT model with our adapter, new or loaded; for DPO and its kin the config."""
        if cfg.adapter != ADAPTER:
            return None
        config = adapter_config(cfg, model)
        if config_only:
            return None, config
        directory = _adapter_directory(cfg)
        if cfg.gradient_checkpointing:
            # Axolotl does this for its own adapters only; reentrant checkpointing needs it
            model.enable_input_require_grads()
        if directory is not None:
            trainable = not (inference or cfg.inference)
            adapted = PeftModel.from_pretrained(model, directory, is_trainable=trainable)
            return adapted, adapted.peft_config["default"]
        adapted = get_peft_model(model, config)
        adapted.print_trainable_parameters()
        return adapted, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Make trainers that make the adapter themselves (DPO and its kin) save it."""
        if cfg.adapter == ADAPTER and cfg.rl and isinstance(trainer.model, PeftModel):
            # Axolotl saves the adapter and then, over it, the model below, which holds layers of
            # both: saving that one saves the adapter as well
            trainer.model.get_base_model().save_pretrained = trainer.model.save_pretrained

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Return the callbacks that log our figures, and that watch over the run."""
        if cfg.adapter != ADAPTER:
            return []
        self._watch = _Watch(cfg)
        return [FiguresCallback(trainer), self._watch]

    def post_train_unload(self, cfg: Any) -> None:
        """Merge on rank 0; the last hook, on every rank, after the process group is gone."""
        if cfg.adapter != ADAPTER:
            return
        if cfg.qalora["merge_on_finish"]:
            adapter = Path(cfg.output_dir).expanduser()
            safe = f"the trained adapter is safe in {adapter}, but merging it failed"
            on_main_process(lambda: self._watch.check_end(adapter), "looking for the best", safe)
            on_main_process(lambda: merge(cfg, adapter), "merging", safe)
            _export(cfg, adapter)
            history = self._watch.history
            unreported = f"{merged_dir(cfg)} is merged and complete, but no report was written"
            on_main_process(
                lambda: try_report(cfg["output_dir"], merged=merged_dir(cfg), history=history),
                "reporting",
                unreported,
            )
            unpushed = f"{merged_dir(cfg)} is merged and complete, but it was not pushed"
            on_main_process(lambda: push(cfg, merged_dir(cfg), history), "pushing", unpushed)


def _export(cfg: Any, adapter: Path) -> None:
    failed = f"{merged_dir(cfg)} is merged and complete, but these exports failed"
    on_main_process(lambda: export(cfg, adapter), "exporting", failed)


class _Watch(TrainerCallback):
    """Holds a run to what its end promises, and keeps its log for when the trainer is gone."""

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self.history: list[dict[str, Any]] = []
        self._best_of: TrainerState | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_best_is_kept(self._cfg, args)
        check_head(kwargs["model"])
        check_loaded_base(kwargs["model"], set_by_trainer=_SET_BY_AXOLOTL)
        check_resumed(kwargs["model"], kwargs["model"].active_adapter, args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_if_best(args, state, control, kwargs.get("metrics") or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history = state.log_history
        self._best_of = state if args.load_best_model_at_end else None
        take_average(args, state, kwargs.get("optimizer"))

    def check_end(self, adapter: Path) -> None:
        """Refuse to merge what Axolotl has saved where it is not the best that was asked for."""
        if self._best_of is not None:
            check_best(self._best_of, "default", adapter)


def adapter_config(cfg: Any, model: Any = None) -> QALoRAConfig:
    """Return Axolotl's `lora_*` and `peft_*` keys as a QALoRAConfig; they mean the same there.

    The head of a reward model is trained whole and saved: its class's task_type says so.
    """
    # None: every quantized linear layer
    targets = None if cfg.lora_target_linear else cfg.lora_target_modules or None
    return QALoRAConfig(
        r=cfg.lora_r or 8,
        lora_alpha=cfg.lora_alpha or cfg.lora_r or 8,
        lora_dropout=cfg.lora_dropout or 0.0,
        target_modules=targets,
        exclude_modules=cfg.get("lora_exclude_modules") or None,
        modules_to_save=cfg.lora_modules_to_save or None,
        rank_pattern=dict(cfg.lora_rank_pattern or {}),
        alpha_pattern=dict(cfg.lora_alpha_pattern or {}),
        use_rslora=bool(cfg.peft_use_rslora),
        layers_to_transform=cfg.peft_layers_to_transform,
        layers_pattern=cfg.peft_layers_pattern,
        init_lora_weights=cfg.peft_init_lora_weights is not False,
        adapt=cfg.qalora["adapt"],
        seed=int(cfg.seed or 0),
        task_type=_task_type(model),
    )


def _task_type(model: Any) -> str:
    kinds = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((t for kind, t in kinds.items() if kind in type(model).__name__), "CAUSAL_LM")


def _use_base(cfg: Any, directory: str) -> None:
    """Load model, config and tokenizer from the quantized base instead of the 16-bit one."""
    cfg["base_model"] = cfg["base_model_config"] = directory
    cfg["revision_of_model"] = None


def _import_file(cfg: Any) -> None:
    """Import a base that is one file, such as a .gguf, once; all else then reads the directory."""
    given = cfg.get("base_model")
    directory = directory_of(given, {"revision": cfg.get("revision_of_model")})
    if directory != given:
        _use_base(cfg, directory)


def _adapter_directory(cfg: Any) -> Path | None:
    """Return the trained adapter to load: `lora_model_dir`, or for merge-lora `output_dir`."""
    if cfg.get("lora_model_dir"):
        return Path(cfg["lora_model_dir"]).expanduser()
    if cfg.get("merge_lora") and cfg.get("output_dir"):
        return Path(cfg["output_dir"]).expanduser()
    return None


def _base_of(adapter: Path) -> str | None:
    """Return the base that an adapter names; a ConfigError says that there is no adapter."""
    config = adapter / ADAPTER_CONFIG_FILE
    if not config.is_file():
        raise ConfigError(
            f"lora_model_dir: {adapter} holds no {ADAPTER_CONFIG_FILE}; expected a trained adapter "
            "(an output_dir, or one of its checkpoints)"
        )
    stored = read_json(config).get("base_model_name_or_path")
    return locate(stored, adapter) if stored else None
