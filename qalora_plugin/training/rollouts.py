"""Reinforcement learning with rollouts from vLLM: only scales and offsets are sent to it.

The integers of a base never change, so vLLM loads them once, with its plugin `qalora_vllm`. After a
step it needs what the merge of that step would write: the offsets of the adapted layers, and their
scales where these are trained.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qalora_kernels import store_offsets
from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.kind import find_kind
from ..distributed.sharding import is_sharded
from ..errors import ConfigError
from ..tuner.layer import QALoRALinear
from .save import quantized_base_on_disk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """What one synchronization sent.

    Args:
        layers: adapted layers.
        tensors: tensors of these, and of modules that are trained whole.
        nbytes: their bytes.
    """

    layers: int
    tensors: int
    nbytes: int


@torch.no_grad()
def changed_tensors(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what the active adapters change, by the names and in the dtypes of a merged checkpoint.

    Per adapted layer that is `NAME.offsets` [G, N], and before it `NAME.scales` [G, N] with adapt
    "scales" or "both"; of modules in `modules_to_save` every parameter.

    Args:
        model: with QALORA adapters on a base that is whole in this process.

    Raises:
        AdapterError: A or B holds NaN or infinity, or is sharded.
    """
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, QALoRALinear):
            base = module.base_layer
            stored = base.stored_name or name
            scales, offsets = module.merged_grid(name)
            if module.change("scales", module.active_adapters) is not None:
                yield f"{stored}.scales", scales.to(base.spec.scales_dtype)
            yield f"{stored}.offsets", store_offsets(offsets, scales, base.spec)
        elif isinstance(module, ModulesToSaveWrapper):
            held = model.active_adapter in module.modules_to_save
            whole = module.modules_to_save[model.active_adapter] if held else module.original_module
            for part, tensor in whole.named_parameters():
                yield f"{name}.{part}", tensor.detach()


def send_changes(model: PeftModel, send: Callable[[str, torch.Tensor], Any]) -> Sent:
    """Send what training has changed to a vLLM that has loaded the same base.

    Args:
        model: see `changed_tensors`.
        send: takes a name and a tensor to vLLM's `load_weights`, such as
            `lambda name, tensor: vllm_model.load_weights([(name, tensor)])`, or
            `VLLMClient.update_named_param` of TRL.

    Returns:
        What was sent.

    Raises:
        AdapterError: see `changed_tensors`.
    """
    layers = tensors = nbytes = 0
    for name, tensor in changed_tensors(model):
        send(name, tensor)
        layers += name.endswith(".offsets")
        tensors, nbytes = tensors + 1, nbytes + tensor.numel() * tensor.element_size()
    return Sent(layers, tensors, nbytes)


def sync_with_vllm(trainer: Any) -> None:
    """Have a trainer of TRL with `use_vllm=True` send scales and offsets alone after each step.

        trainer = GRPOTrainer("base-int4", ..., peft_config=QALoRAConfig(r=16))
        sync_with_vllm(trainer)
        trainer.train()

    TRL itself would send embeddings, norms and integers, and leave out offsets, which are buffers.
    Meant for both of its modes, "colocate" and "server", in which it has not run yet;
    `send_changes`, which it calls, is tested with a real engine. What a step sent is logged as
    "qalora/sync_bytes", and kept as `trainer.vllm_generation.sent`.

    Raises:
        ConfigError: the trainer does not use vLLM, its model has no QALORA adapter or is sharded,
            vLLM cannot load its base, or sleep mode is on.
    """
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise ConfigError(
            f"sync_with_vllm: expected a trainer with use_vllm=True, found a "
            f"{type(trainer).__name__} that generates by itself. Set use_vllm, or leave this out"
        )
    _check(generation)

    def sync_weights() -> None:
        generation.sent = send_changes(generation.model, generation._push_param_to_vllm)
        _log.info("sent to vLLM: %s", generation.sent)
        if generation.mode == "colocate":
            generation.llm.reset_prefix_cache()
        elif generation.accelerator.is_main_process:
            generation.vllm_client.reset_prefix_cache()

    generation.sent = None
    generation.sync_weights = sync_weights
    trainer.add_callback(_LogSent(generation))


def _check(generation: Any) -> None:
    model = generation.model
    if not isinstance(model, PeftModel) or not any(
        isinstance(module, QALoRALinear) for module in model.modules()
    ):
        raise ConfigError(
            "sync_with_vllm: expected a model with a QALORA adapter. Give the trainer "
            "peft_config=QALoRAConfig(...)"
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ConfigError(
            "sync_with_vllm: parameters are sharded (ZeRO-3, FSDP), and no process has a whole "
            "adapter. Train with DDP or ZeRO-2: the quantized base is small"
        )
    if getattr(generation, "enable_sleep_mode", False):
        raise ConfigError(
            "sync_with_vllm: with vllm_enable_sleep_mode vLLM reads the base from disk again when "
            "it wakes, and what was sent is lost. Leave it out"
        )
    base = quantized_base_on_disk(model)
    if base is None or find_kind(base).method != QUANT_METHOD:
        raise ConfigError(
            "sync_with_vllm: vLLM loads the base by its name, and expected is a directory of ours, "
            f"found {base or model.name_or_path}. Quantize it once with `qalora quantize MODEL "
            "--out DIR`, or bring it into our format with `qalora import`, and train on DIR"
        )


class _LogSent(TrainerCallback):
    """Adds the bytes of the last synchronization to the rows of the training's log."""

    def __init__(self, generation: Any) -> None:
        self._generation = generation

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Extend a row, if something was sent."""
        if self._generation.sent is not None:
            row = {"qalora/sync_bytes": self._generation.sent.nbytes}
            kwargs["logs"].update(row)
            state.log_history[-1].update(row)
