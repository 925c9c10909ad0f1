"""Which modules an adapter's config selects, by PEFT's rule, with expressions that end in time."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ..architecture.patterns import match_module, match_start, match_whole
from ..errors import ConfigError

SELECTING_FIELDS = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "target_parameters",
)  # fmt: skip
"""The fields of a config that decide."""


def is_selected(settings: Mapping[str, Any], name: str) -> bool:
    """Say whether a config's `SELECTING_FIELDS` select the module `name`; `target_modules` is set.

    Errors are those of `select`.
    """
    return bool(select(settings, name))


def select(settings: Mapping[str, Any], name: str) -> Any:
    """Return the same as PEFT does: what is false and excluded is told from what does not match.

    Raises:
        ConfigError: an expression is none or takes too long, or layers_pattern is no name.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen = {field: settings.get(field) for field in SELECTING_FIELDS}
    if isinstance(chosen["exclude_modules"], str):
        excluded = match_whole(chosen["exclude_modules"], name)
        chosen["exclude_modules"] = [name] if excluded else None
    if any(match_module(entry, name) for entry in chosen["modules_to_save"] or ()):
        chosen["exclude_modules"] = [name]
    chosen["modules_to_save"] = None
    if isinstance(chosen["target_modules"], str):
        chosen["target_modules"] = [name] if match_whole(chosen["target_modules"], name) else []
        chosen["layers_to_transform"] = None  # goes with names alone
    patterns = chosen["layers_pattern"] or ()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not pattern.replace(".", "").replace("_", "").isalnum():
            raise ConfigError(f"layers_pattern: expected the name of a module, found {pattern!a}")
    return check_target_module_exists(SimpleNamespace(**chosen), name)


def pattern_key(patterns: Mapping[str, Any], name: str) -> str:
    """Return the key of rank_pattern or alpha_pattern that matches a name's end; else the name.

    Raises:
        ConfigError: a key is no expression, or takes too long.
    """
    return next((key for key in patterns if match_start(rf"(.*\.)?({key})$", name)), name)
