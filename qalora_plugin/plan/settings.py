"""The settings of the training run that is planned, checked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..tuner.names import ADAPT_PARTS

if TYPE_CHECKING:
    import torch

CHOICES = {
    "adapt": tuple(ADAPT_PARTS),
    "zero": (0, 2, 3),
    "offload": ("none", "optimizer", "all"),
    "optimizer": ("adamw", "adamw_8bit", "sgd"),
    "dtype": ("bfloat16", "float16", "float32"),
    "device": ("cuda", "cpu"),
}
"""The values that each of these settings can have."""


@dataclass(frozen=True)
class PlanSettings:
    """The settings of one training run.

    Args:
        bits: width of the base's integers; None for what config.json says, or 4 where the model
            is not quantized.
        group_size: inputs that share a scale; None for what config.json says, or 32.
        adapt: "zeros", "scales" or "both", as in QALoRAConfig.
        r: rank of the adapters.
        target_modules: names of layers or last parts of names; None for every quantized layer.
        gpus: number of processes, each with its own micro-batch.
        zero: 0 (plain data parallel), or DeepSpeed's ZeRO stage 2 or 3.
        offload: "none", "optimizer" (states in host memory) or "all" (parameters as well).
        seq_len: tokens in a row.
        micro_batch: rows in a step of one GPU.
        gradient_checkpointing: keep only the inputs of the blocks and compute the rest again.
        optimizer: "adamw" (8 bytes a trained parameter), "adamw_8bit" or "sgd" (no state).
        dtype: of the tensors that are not quantized, and of autocast; "float32" for no autocast.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: a value is out of range, or two values contradict each other.
    """

    bits: int | None = None
    group_size: int | None = None
    adapt: str = "zeros"
    r: int = 16
    target_modules: tuple[str, ...] | None = None
    gpus: int = 1
    zero: int = 0
    offload: str = "none"
    seq_len: int = 2048
    micro_batch: int = 1
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("r", "gpus", "seq_len", "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name}: expected one of {allowed}, found {getattr(self, name)!r}"
                )
        needed = {"none": 0, "optimizer": 2, "all": 3}[self.offload]
        if self.zero < needed:
            raise ConfigError(
                f"offload={self.offload!r} needs ZeRO stage {needed}, found zero={self.zero}: "
                "DeepSpeed moves to host memory only what it partitions"
            )

    @property
    def torch_dtype(self) -> "torch.dtype":
        """Return the torch dtype that `dtype` names."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
