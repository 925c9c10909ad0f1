"""The user's own file as training and held-out rows, in TRL's formats."""

import hashlib
import json
from pathlib import Path

from ..errors import ConfigError
from ..quantize.rows import file_rows, read_row

_HELD_OUT_ONE_IN = 8
_TEXT_CHUNK = 1200  # characters; a few hundred tokens


def load_rows(path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Read a .jsonl or .txt file and split its rows into training and held-out ones by their hash.

    Args:
        path: .jsonl with rows that `read_row` takes, without messages; or a plain .txt file.

    Returns:
        (training, held-out), each a list of {"prompt", "completion"} or {"text"}; every prompt ends
        with a line break.

    Raises:
        ConfigError: another kind of file, or too little is there to hold out a part.
        QuantizationError: the file cannot be read, or a line is not JSON or holds no known fields.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise ConfigError(
            f"{path}: expected a .jsonl or .txt file, found {path.suffix!r}: convert it"
        )
    training: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for where, found in file_rows(path, _TEXT_CHUNK):
        row = read_row(found, where)
        if "prompt" in row and not row["prompt"].endswith("\n"):
            row["prompt"] += "\n"
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
        (held_out if digest[0] % _HELD_OUT_ONE_IN == 0 else training).append(row)
    if len(training) < 8 or not held_out:
        raise ConfigError(
            f"{path}: expected at least a few dozen rows, found {len(training) + len(held_out)}. "
            "Give more, or leave --dataset out"
        )
    return training, held_out
