"""Regular expressions from files: an expression that would take for ever is an error instead.

`re` cannot be stopped, and an adapter's or a base's config may hold any expression. The package
`regex` takes the same ones, and a time limit.
"""

from functools import cache
from typing import Any

from ..errors import ConfigError

SECONDS = 1.0  # for one name
_LONGEST = 10_000  # characters


def match_start(pattern: str, name: str) -> bool:
    """Say whether an expression matches the beginning of a name, as `re.match` does.

    Raises:
        ConfigError: it is no expression, or takes too long.
    """
    return _run("match", pattern, name)


def match_whole(pattern: str, name: str) -> bool:
    """Say whether an expression matches a whole name, as `re.fullmatch` does; errors likewise."""
    return _run("fullmatch", pattern, name)


def match_inside(pattern: str, name: str) -> bool:
    """Say whether an expression matches a part of a name, as `re.search` does; errors likewise."""
    return _run("search", pattern, name)


def match_module(entry: str, name: str) -> bool:
    """Say whether a name is, or lies below, a module that `modules_to_save` names, as in PEFT."""
    return match_start(rf"(^|.*\.){entry}($|\..*)", name)


def _run(method: str, pattern: str, name: str) -> bool:
    try:
        return getattr(_compiled(pattern), method)(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ConfigError(
            f"the pattern {pattern!a:.200} takes more than {SECONDS:g} s on {name!a:.200}. Write "
            "names, or a pattern without repetitions in repetitions"
        ) from None


@cache
def _compiled(pattern: str) -> Any:
    import regex  # type: ignore[import-untyped]

    if len(pattern) > _LONGEST:
        raise ConfigError(
            f"a pattern of {len(pattern)} characters, {pattern!a:.60}...: expected at most "
            f"{_LONGEST}"
        )
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise ConfigError(f"{pattern!a:.200} is not a regular expression ({error})") from error
