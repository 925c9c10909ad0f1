"""Tensors that are spread over ranks: ZeRO-3's partitioned parameters and FSDP2's DTensors."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import modeling_utils
from transformers.integrations import deepspeed as settings

from .ranks import rank

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """Return a parameter's name without what FSDP, checkpointing and compiling add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this rank holds only a part of the tensor."""
    return hasattr(tensor, "ds_id") or isinstance(tensor, DTensor)


def gathered(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the whole tensors, detached.

    Where some are sharded all ranks have to call, in the same order.
    """
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if partitioned:
        import deepspeed

        with deepspeed.zero.GatheredParameters(partitioned):
            return [tensor.detach().clone() for tensor in tensors]
    return [
        (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
        for tensor in tensors
    ]


def zero3_enabled() -> bool:
    """Return whether DeepSpeed's ZeRO-3 is set up, so that models are partitioned as they load."""
    return settings.is_deepspeed_zero3_enabled()


def fsdp_enabled() -> bool:
    """Return whether training is set up with FSDP."""
    # accelerate launch sets the first; TrainingArguments(fsdp=...) the second, to true or false
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return launched or "FSDP_CPU_RAM_EFFICIENT_LOADING" in os.environ


def loads_from_rank_0() -> bool:
    """Return whether this rank gets its weights from rank 0 (FSDP's cpu_ram_efficient_loading)."""
    efficient = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    return fsdp_enabled() and efficient and rank() != 0


def partition(module: nn.Module) -> None:
    """Keep only this rank's part of each parameter of a module (ZeRO-3); all ranks have to call."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed()
    deepspeed.zero.Init(module=module, config_dict_or_path=settings.deepspeed_config())


@contextmanager
def in_one_process() -> Iterator[None]:
    """Build models whole for a while, though ZeRO-3 is set up: for what one rank does alone."""
    config = settings._hf_deepspeed_config_weak_ref
    settings.unset_hf_deepspeed_config()
    enabled = modeling_utils.is_deepspeed_zero3_enabled  # Axolotl makes it True for good
    modeling_utils.is_deepspeed_zero3_enabled = lambda: False
    try:
        yield
    finally:
        settings._hf_deepspeed_config_weak_ref = config
        modeling_utils.is_deepspeed_zero3_enabled = enabled
