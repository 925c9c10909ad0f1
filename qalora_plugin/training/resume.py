"""Trainings that go on from a checkpoint: which one, and whether its adapter is in training."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

from ..distributed.sharding import gathered, plain_name
from ..errors import ConfigError
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ..tuner.names import PREFIX
from ..tuner.resuming import adapter_directory, check_settings
from .best import find_best, is_before, read_state


def check_resumed(
    model: PeftModel, name: str, args: TrainingArguments, state: TrainerState
) -> Path | None:
    """Check that a training goes on with what it was stopped with; call it in `on_train_begin`.

    Where parameters are sharded all ranks have to call.

    Args:
        model: with its adapters, as the Trainer has loaded them.
        name: of the adapter in training.
        args: the Trainer's.
        state: the Trainer's; the path of its best checkpoint is corrected where that was moved.

    Returns:
        The checkpoint; None where training starts, or none is found.

    Raises:
        ConfigError: the adapter has other numbers or another scaling than in the checkpoint, or the
            best checkpoint is gone.
        AdapterError: the checkpoint's adapter belongs to another base.
    """
    checkpoint = _resumed_checkpoint(model, name, args, state)
    if args.load_best_model_at_end:
        find_best(state, checkpoint)
    if checkpoint is not None:
        check_settings(model, checkpoint)
        _check_policy(model, name, state, checkpoint)
    return checkpoint


def _resumed_checkpoint(
    model: PeftModel, name: str, args: TrainingArguments, state: TrainerState
) -> Path | None:
    """Find the checkpoint that a training goes on from; None where it starts, or none is found.

    The Trainer tells callbacks only its step and history, so both are compared.
    """
    if state.global_step == 0:
        return None
    usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    given = Path(str(args.resume_from_checkpoint))
    for path in (model.base_model.resumed_from or given, given, usual):
        found, adapter = read_state(path), adapter_directory(name, path)
        if found is None or not (adapter / ADAPTER_CONFIG_FILE).exists():
            continue
        if is_before(found, state) and is_before(state, found):
            return path
    return None


def _check_policy(model: PeftModel, name: str, state: TrainerState, checkpoint: Path) -> None:
    """Compare the adapter in training with the one in the checkpoint.

    Only where the model has others beside it: `tuner.resuming` says what the Trainer does then.
    """
    if len(model.peft_config) == 1:
        return
    file = adapter_directory(name, checkpoint) / ADAPTER_WEIGHTS_FILE
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
