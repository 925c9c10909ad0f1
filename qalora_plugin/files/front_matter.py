"""Read the YAML at the start of a README.md, which anybody may have written."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .inside import open_regular
from .schemas import Card, check_types

_LONGEST = 64 << 10  # bytes; the front matter of the Hub's cards has a few hundred
_BLOCK = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_front_matter(path: Path) -> dict[str, Any]:
    """Return the keys of a card; none where there are none, or they are not what a card has.

    A README.md is text for people, and no reason to refuse a model.

    Args:
        path: the file.
    """
    import yaml  # type: ignore[import-untyped]

    with suppress(CheckpointError, yaml.YAMLError, ValueError, RecursionError):
        with open_regular(path) as file:
            text = file.read(_LONGEST).decode("utf-8", "replace")
        found = _BLOCK.match(text)
        value = yaml.safe_load(found[1]) if found else None
        if isinstance(value, dict):
            check_types(value, Card, str(path), CheckpointError)
            return value
    return {}
