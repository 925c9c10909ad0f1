"""Rank and scaling of an adapter's layers, from the fields that LoRA's configs and ours share."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import QALoRAError
from .selecting import pattern_key

SCALING_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
"""The fields of a config that `rank_and_scaling` takes, by keyword."""


def rank_and_scaling(
    name: str,
    *,
    r: int,
    lora_alpha: float,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
) -> tuple[int, float]:
    """Return the rank of a layer, and the factor of its B A.

    The factor is lora_alpha / rank, or / sqrt(rank) with use_rslora (arXiv 2312.03732). Patterns
    are {name in the base model, or regular expression for its end: value}, as in PEFT.
    """
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    rank = ranks.get(pattern_key(ranks, name), r)
    alpha = alphas.get(pattern_key(alphas, name), lora_alpha)
    return rank, alpha / (math.sqrt(rank) if use_rslora else rank)


def check_scaling(settings: Mapping[str, Any], where: str, error: type[QALoRAError]) -> None:
    """Check the `SCALING_FIELDS` among a config's settings; `where` names it in the message.

    Raises:
        QALoRAError: of the class `error`: a rank is no positive integer, or an alpha no positive
            finite number.
    """
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        values: dict[str, Any] = {field: settings.get(field)}
        for key, value in (settings.get(pattern) or {}).items():
            values[f"{pattern}[{key!r}]"] = value
        kind, is_kind = ("integer", is_int) if field == "r" else ("number", is_number)
        for name, value in values.items():
            if not (is_kind(value) and 0 < value < math.inf):
                raise error(f"{where}: {name} must be a positive {kind}, found {value!r}")


def is_number(value: Any) -> bool:
    """Say whether a value is an int or a float, and not a bool."""
    return is_int(value) or isinstance(value, float)


def is_int(value: Any) -> bool:
    """Say whether a value is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
