"""Trainings that go on from a checkpoint: which one, and the policy that the Trainer leaves out."""

from pathlib import Path

from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..distributed.sharding import fsdp_enabled
from ..errors import ConfigError
from ..files.names import ADAPTER_CONFIG_FILE
from .save import adapter_directory


def resumed_checkpoint(
    model: PeftModel, args: TrainingArguments, state: TrainerState
) -> Path | None:
    """Find the checkpoint that a training goes on from; None where it starts, or none is found.

    The Trainer tells callbacks only its step and history, so both are compared.
    """
    if state.global_step == 0:
        return None
    usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    for path in (Path(str(args.resume_from_checkpoint)), usual):
        saved, adapter = path / TRAINER_STATE_NAME, adapter_directory(model, path)
        if saved.exists() and (adapter / ADAPTER_CONFIG_FILE).exists():
            found = TrainerState.load_from_json(str(saved))
            if (found.global_step, found.log_history) == (state.global_step, state.log_history):
                return path
    return None


def load_policy(
    model: PeftModel, args: TrainingArguments, state: TrainerState, checkpoint: Path | None
) -> None:
    """Load the trained adapter of a checkpoint that holds others too, in place.

    TRL's trainers add a frozen copy "ref" of an adapter that they start from. Where a checkpoint
    has adapters in subdirectories, the Trainer (transformers 5.16, `_load_from_checkpoint`) loads
    these alone: the policy would silently start again. Optimizer states are the checkpoint's
    already, and the loaded numbers go into the parameters that the optimizer holds. DeepSpeed and
    FSDP load all adapters from files of their own.

    Args:
        model: with its adapters; the active one is trained.
        args: the Trainer's.
        state: the Trainer's; at step 0 nothing is loaded.
        checkpoint: what `resumed_checkpoint` found.

    Raises:
        ConfigError: the checkpoint was not found.
    """
    name = model.active_adapter
    others = sorted(set(model.peft_config) - {name})
    by_files = args.deepspeed_plugin is not None or fsdp_enabled()
    if state.global_step == 0 or not others or name != "default" or by_files:
        return
    if checkpoint is None:
        raise ConfigError(
            f"resume_from_checkpoint: the model has the adapters {[name, *others]}, and of such a "
            f"checkpoint the Trainer loads {others} alone, so that training would go on with an "
            f"adapter that is not the checkpoint's. Expected the checkpoint of step "
            f"{state.global_step} in {args.output_dir}, found none. Set output_dir to the "
            "directory that holds it, or resume_from_checkpoint in the trainer's config"
        )
    model.load_adapter(str(checkpoint), name, is_trainable=True)
