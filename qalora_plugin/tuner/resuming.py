"""Resuming: the adapter in training is the one of the checkpoint, on the same base.

Into an adapter that exists PEFT loads numbers alone: a checkpoint's own config, with the scaling
and the base that the numbers belong to, is never read. So both are compared here.

TRL's trainers of preferences add a frozen copy "ref" of an adapter that they start from. PEFT saves
"default", the policy, in a checkpoint's own folder and "ref" below it, and of such a checkpoint
transformers 5.16 (`Trainer._load_from_checkpoint`) loads what lies below alone: the policy would
start again without a word. transformers 5.24 loads both. DeepSpeed and FSDP load the adapter in
training from their own files.
"""

import functools
from pathlib import Path
from typing import Any

from peft import PeftModel

from ..distributed.sharding import fsdp_enabled
from ..errors import ConfigError
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from .config import PEFT_TYPE, QALoRAConfig
from .scaling import SCALING_FIELDS
from .targets import check_base

_INSTALLED = "_qalora_original"


def install() -> None:
    """Wrap the Trainer's loading of checkpoints; a second call does nothing."""
    from transformers import Trainer  # late: importing it takes a second

    original = Trainer._load_from_checkpoint
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        adapted = self.model if model is None else model
        check_settings(adapted, Path(resume_from_checkpoint))
        original(self, resume_from_checkpoint, model)
        load_policy(adapted, Path(resume_from_checkpoint))
        if isinstance(adapted, PeftModel):
            adapted.base_model.resumed_from = Path(resume_from_checkpoint)

    setattr(load, _INSTALLED, original)
    Trainer._load_from_checkpoint = load  # type: ignore[method-assign]


def adapter_directory(name: str, directory: Path) -> Path:
    """Return where PEFT's `save_pretrained(directory)` puts the adapter of this name.

    That is below the directory, unless the adapter is called "default".
    """
    return directory if name == "default" else directory / name


def check_settings(model: Any, checkpoint: Path) -> None:
    """Compare scaling and base of the model's adapters with those in a checkpoint.

    Args:
        model: what the Trainer resumes; adapters that are not ours are left alone.
        checkpoint: the directory; adapters that it does not hold are left alone.

    Raises:
        ConfigError: a setting that scales the adapter is another one.
        AdapterError: the checkpoint's adapter was trained on another base.
    """
    if not isinstance(model, PeftModel):
        return
    for name, config in model.peft_config.items():
        directory = adapter_directory(name, checkpoint)
        file = directory / ADAPTER_CONFIG_FILE
        if config.peft_type != PEFT_TYPE or not file.exists():
            continue
        stored = QALoRAConfig.from_pretrained(str(directory))
        for field in (*SCALING_FIELDS, "adapt", "modules_to_save"):
            was, now = (getattr(side, field) or None for side in (stored, config))
            if was != now:
                raise ConfigError(
                    f"resume_from_checkpoint: {file}: {field} is {was!r}, and {now!r} in this "
                    "training: the numbers of the checkpoint would mean another change. Set it as "
                    "it was, or start without the checkpoint"
                )
        check_base(stored, model.base_model.identity)


def load_policy(model: Any, checkpoint: Path) -> None:
    """Load the adapter in training from a checkpoint that holds others below it, in place.

    The numbers go into the parameters that an optimizer holds.

    Args:
        model: what the Trainer resumes; one without several adapters, ours among them, is left
            alone.
        checkpoint: the directory.

    Raises:
        ConfigError: the checkpoint does not hold that adapter.
    """
    if not isinstance(model, PeftModel) or len(model.peft_config) == 1 or fsdp_enabled():
        return
    name = model.active_adapter
    if name != "default" or model.peft_config[name].peft_type != PEFT_TYPE:
        return
    if not (checkpoint / ADAPTER_WEIGHTS_FILE).exists():
        raise ConfigError(
            f"{checkpoint}: expected {ADAPTER_WEIGHTS_FILE}, the adapter in training, found others "
            f"of {sorted(model.peft_config)} alone: training would start again from the adapter "
            "that it was given. Resume from another checkpoint, or leave resume_from_checkpoint out"
        )
    model.load_adapter(str(checkpoint), name, is_trainable=True)
