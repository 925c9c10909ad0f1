"""The end of a training: that the weights are those which the log calls the result.

With `load_best_model_at_end` the Trainer loads the checkpoint that it takes for the best, and goes
on with the last weights, without an error, where it finds none: its folder was moved, or the best
evaluation fell between two saves. A folder of an earlier training with the same number it takes as
well. And an optimizer that averages weights (schedule-free ones) evaluates others than it trains.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from ..errors import CheckpointError, ConfigError
from ..files.names import ADAPTER_WEIGHTS_FILE
from ..tuner.resuming import adapter_directory

_LAST = (
    "The weights in memory are those of the last step: choose a checkpoint, and `qalora merge` it"
)


def is_before(earlier: TrainerState, later: TrainerState) -> bool:
    """Say whether a state is an earlier one of the same training, or the same: by its log."""
    rows = len(earlier.log_history)
    logs = [_as_text(log) for log in (earlier.log_history, later.log_history[:rows])]
    return earlier.global_step <= later.global_step and logs[0] == logs[1]


def _as_text(log: list[dict[str, float]]) -> str:
    return json.dumps(log, sort_keys=True)  # in which a NaN is equal to itself


def read_state(checkpoint: Path) -> TrainerState | None:
    """Read the Trainer's state from a checkpoint; None where there is none.

    Raises:
        CheckpointError: the file is damaged, or another release of transformers wrote it.
    """
    path = checkpoint / TRAINER_STATE_NAME
    try:
        return TrainerState.load_from_json(str(path)) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected the state of the Trainer, found what cannot be read ({error}). Copy "
            "the checkpoint again, or choose another"
        ) from error


def save_if_best(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float]
) -> None:
    """Have the Trainer save what was just evaluated, if it is the best so far; from `on_evaluate`.

    It saves every `save_steps`, and forgets the best evaluation where that fell in between.
    """
    if not args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
        return
    name = "eval_" + str(args.metric_for_best_model).removeprefix("eval_")
    if name not in metrics or state.global_step == 0:  # one of several sets; eval_on_start
        return
    found, best = metrics[name], state.best_metric
    if best is None:
        better = found == found  # no NaN
    else:
        better = found > best if args.greater_is_better else found < best
    control.should_save = control.should_save or better


def find_best(state: TrainerState, resumed: Path | None) -> None:
    """Correct the path of the best checkpoint where a training goes on in a folder that was moved.

    Args:
        state: the Trainer's, which holds the path as it was, or, from transformers 5.24 on, none
            where it is gone.
        resumed: the checkpoint that the training goes on from.

    Raises:
        ConfigError: the best checkpoint is in neither place.
    """
    stored, step = state.best_model_checkpoint, state.best_global_step
    if stored is not None and Path(stored).is_dir():
        return
    if stored is None and (step is None or resumed is None):
        return
    name = f"checkpoint-{step}" if stored is None else Path(stored).name
    moved = None if resumed is None else resumed.absolute().parent / name
    found = None if moved is None else read_state(moved)
    if moved is None or found is None or not is_before(found, state):
        raise ConfigError(
            f"load_best_model_at_end: {stored or name}, the best checkpoint until step "
            f"{state.global_step}, is not there, nor is it beside the one that training goes on "
            "from. Put it back, or set load_best_model_at_end=False"
        )
    state.best_model_checkpoint = str(moved)


def best_adapter(state: TrainerState, name: str) -> Path | None:
    """Return the directory of the best adapter; None where nothing was evaluated.

    Args:
        state: the Trainer's, of a training with `load_best_model_at_end`.
        name: the adapter's.

    Raises:
        ConfigError: no checkpoint holds what the log calls the best.
    """
    step, stored = state.best_global_step, state.best_model_checkpoint
    if step is None and stored is None:
        if any("eval_runtime" in row and row["step"] > 0 for row in state.log_history):
            raise ConfigError(f"load_best_model_at_end: no evaluation gave a number. {_LAST}")
        return None
    saved = None if stored is None else read_state(Path(stored))
    if saved is None:
        raise ConfigError(
            f"load_best_model_at_end: step {step} was the best, and its checkpoint is not there "
            f"(looked for {stored}). {_LAST}"
        )
    if not is_before(saved, state):
        raise ConfigError(
            f"load_best_model_at_end: {stored} has the number of the best step, but is of another "
            f"training, and the Trainer has loaded it. Use an empty output_dir, and train again"
        )
    if step is not None and saved.global_step != step:
        raise ConfigError(
            f"load_best_model_at_end: step {step} was the best and was not saved; the Trainer has "
            f"loaded {stored}. Merge that one, or another, with `qalora merge`"
        )
    return adapter_directory(name, Path(stored))


def check_best(state: TrainerState, name: str, adapter: Path) -> None:
    """Refuse to merge another adapter than the best one, where that was asked for.

    The Trainer only warns where it does not find the best adapter, as of one that is not called
    "default", and goes on with the last one.

    Raises:
        ConfigError: see `best_adapter`; or the adapter is another one.
    """
    best = best_adapter(state, name)
    if best is None:
        return
    kept = best / ADAPTER_WEIGHTS_FILE
    if not kept.exists():  # FSDP's own shards: nothing to compare with
        return
    found, wanted = load_file(adapter / ADAPTER_WEIGHTS_FILE), load_file(kept)
    same = found.keys() == wanted.keys() and all(
        torch.equal(found[key].float(), wanted[key].float()) for key in found
    )
    if not same:
        raise ConfigError(
            f"load_best_model_at_end: the Trainer was to load the best adapter, {kept}, but "
            f"holds another one. Merge the best one with `qalora merge {best} --out DIR`"
        )


def take_average(args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
    """Put the weights that a schedule-free optimizer evaluates into the model; from `on_train_end`.

    After a step of training it holds others. The best checkpoint, which was saved after an
    evaluation, has the right ones.
    """
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:
        return
    if callable(getattr(optimizer, "eval", None)):
        optimizer.eval()
