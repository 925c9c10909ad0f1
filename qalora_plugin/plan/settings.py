"""What a training run is planned for: the options of `qalora plan`, checked."""

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..tuner.names import ADAPT_PARTS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
ZERO_STAGES = (0, 2, 3)
OFFLOADS = ("none", "optimizer", "all")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class PlanSettings:
    """One training run.

    Args:
        bits: of the base; None for what config.json says, 4 where it is not quantized.
        group_size: likewise, 32 where it is not quantized.
        adapt: "zeros", "scales" or "both", as in QALoRAConfig.
        r: rank.
        target_modules: names or last parts of names; None for every quantized linear layer.
        gpus: processes, each with its own micro-batch.
        zero: 0 (plain data parallel), or DeepSpeed's ZeRO stage 2 or 3.
        offload: "none", "optimizer" (states in host memory), "all" (parameters as well).
        seq_len: tokens in a row.
        micro_batch: rows in a step of one GPU.
        gradient_checkpointing: keep only the inputs of the blocks, compute the rest again.
        optimizer: "adamw" (8 bytes a trained parameter), "adamw_8bit" or "sgd" (no state).
        dtype: of the 16-bit tensors and of autocast; "float32" for neither.
        device: "cuda" or "cpu".

    Raises:
        ConfigError: a value is out of range, or two contradict each other.
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
        for name, allowed in (
            ("adapt", tuple(ADAPT_PARTS)),
            ("zero", ZERO_STAGES),
            ("offload", OFFLOADS),
            ("optimizer", OPTIMIZERS),
            ("dtype", tuple(DTYPES)),
            ("device", DEVICES),
        ):
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
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch names it."""
        return DTYPES[self.dtype]
