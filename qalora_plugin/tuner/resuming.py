"""Resuming with several adapters: the one in training is loaded too.

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
from ..files.names import ADAPTER_WEIGHTS_FILE
from .config import PEFT_TYPE

_INSTALLED = "_qalora_original"


def install() -> None:
    """Wrap the Trainer's loading of checkpoints; a second call does nothing."""
    from transformers import Trainer  # late: importing it takes a second

    original = Trainer._load_from_checkpoint
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def load(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        original(self, resume_from_checkpoint, model)
        load_policy(self.model if model is None else model, Path(resume_from_checkpoint))

    setattr(load, _INSTALLED, original)
    Trainer._load_from_checkpoint = load  # type: ignore[method-assign]


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
