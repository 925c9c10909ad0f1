"""Read and write JSON objects; the one owner of their form on disk, and of what is let in.

Every file that is read here may be hostile. What Python's parser lets through and what would fail
later, far from the file, is refused at once: numbers that no tensor holds, half characters, keys
that are there twice, nesting that exhausts the stack, files of any size.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .inside import open_regular

MAX_JSON_BYTES = 128 << 20  # the largest tokenizer.json on the Hub have 35 MB, an index 9 MB
MAX_DEPTH = 40
_DIGITS = 40  # transformers writes 10^30 as the length of a tokenizer that has no limit
_RESTORE = "Download or copy it again."


class _Refused(ValueError):
    """A value that JSON allows and we do not."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that lies in its directory, links followed.

    Raises:
        CheckpointError: the file is missing, unreadable, too large, not JSON, not an object, or
            holds what nothing of ours writes (see above).
    """
    with open_regular(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found more. {_RESTORE}"
        )
    try:
        value = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). {_RESTORE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}. {_RESTORE}"
        )
    return value


def parse_json(raw: bytes | str) -> Any:
    """Parse JSON, and refuse what is refused in a file.

    Raises:
        ValueError: says what, and where.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError:
        raise _Refused("it is nested too deeply") from None
    for part in _strings(value):
        if not part.isascii() and any("\ud800" <= character <= "\udfff" for character in part):
            raise _Refused(f"half a character (a lone surrogate) in {part!a:.80}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"key {key!a:.200} appears twice")
            seen.add(key)
    return value


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _Refused(f"a number of {len(digits)} digits, where at most {_DIGITS} make sense")
    return int(digits)


def _strings(value: Any) -> Iterator[str]:
    """Yield every key and string; refuse deep nesting, without recursion."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise _Refused(f"it is nested more than {MAX_DEPTH} levels deep")
        inner: list[Any] = []
        for part in level:
            if isinstance(part, str):
                yield part
            elif isinstance(part, dict):
                yield from part
                inner.extend(part.values())
            elif isinstance(part, list):
                inner.extend(part)
        level, depth = inner, depth + 1


def json_text(value: Any, *, sort_keys: bool = True) -> str:
    """Return `value` as the text of a file: indented, with a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` in the form of `json_text`."""
    path.write_text(json_text(value), encoding="utf-8")
