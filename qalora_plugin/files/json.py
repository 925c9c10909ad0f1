"""Read and write JSON objects; the one owner of their form on disk."""

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_RESTORE = "Download or copy it again."


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). {_RESTORE}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). {_RESTORE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}. {_RESTORE}"
        )
    return value


def json_text(value: Any, *, sort_keys: bool = True) -> str:
    """Return `value` as the text of a file: indented, with a newline at the end."""
    return json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write `value` to `path` in the form of `json_text`."""
    path.write_text(json_text(value, sort_keys=sort_keys), encoding="utf-8")
