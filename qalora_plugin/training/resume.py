"""Trainings that go on from a checkpoint: which one, and whether its adapter is in training."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..distributed.sharding import gathered, plain_name
from ..errors import ConfigError
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ..tuner.names import PREFIX
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


def check_policy(model: PeftModel, state: TrainerState, checkpoint: Path | None) -> None:
    """Compare the adapter in training with the one in the checkpoint that training goes on from.

    Only where the model has others beside it: `tuner.resuming` says what the Trainer does then.
    Where parameters are sharded all ranks have to call.

    Args:
        model: with its adapters, as the Trainer has loaded them.
        state: the Trainer's; at step 0 nothing is compared.
        checkpoint: what `resumed_checkpoint` found; None, too, compares nothing.

    Raises:
        ConfigError: they differ.
    """
    if state.global_step == 0 or len(model.peft_config) == 1 or checkpoint is None:
        return
    name, file = model.active_adapter, adapter_directory(model, checkpoint) / ADAPTER_WEIGHTS_FILE
    stored = load_file(file) if file.exists() else {}  # FSDP may have saved shards alone
    for key, parameter in model.named_parameters():
        key = plain_name(key)
        if PREFIX not in key or f".{name}." not in key:
            continue
        (whole,) = gathered([parameter])
        wanted = stored.get(key.replace(f".{name}.", "."))
        if wanted is not None and not torch.equal(whole.cpu(), wanted.to(whole.dtype)):
            raise ConfigError(
                f"resume_from_checkpoint: {key} is not what {file} holds, so that training would "
                f"go on with another adapter than that of step {state.global_step}. Merge that one "
                f"(`qalora merge {file.parent} --out DIR`), or train on without resuming"
            )
