"""Rank and scaling of an adapter's layers, from the fields that LoRA's configs and ours share."""

import math
from collections.abc import Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from ..errors import QALoRAError

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
    """Return the rank of a layer, and the factor of its B A, which is lora_alpha / rank.

    Args:
        name: of the layer in the base model.
        r: rank where no pattern matches.
        lora_alpha: likewise.
        rank_pattern: other ranks, {name, or regular expression for its end: rank}, as in PEFT.
        alpha_pattern: likewise for lora_alpha.
        use_rslora: divide by sqrt(rank) instead (arXiv 2312.03732).
    """
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), lora_alpha)
    return rank, alpha / (math.sqrt(rank) if use_rslora else rank)


def check_scaling(settings: Mapping[str, Any], where: str, error: type[QALoRAError]) -> None:
    """Check the numbers that `rank_and_scaling` computes with.

    Args:
        settings: values by name of field; others than `SCALING_FIELDS` are not looked at.
        where: the config, for the message.
        error: the class to raise.

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
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """Say whether a value is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
