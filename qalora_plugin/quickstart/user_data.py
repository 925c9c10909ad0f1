"""The user's own file as training and held-out rows, in TRL's formats."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

# (prompt, completion) fields that public instruction sets use
_PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
)
_HELD_OUT_ONE_IN = 8
_TEXT_CHUNK = 1200  # characters; a few hundred tokens


def load_rows(path: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows of a .jsonl or .txt file, split into training and held-out ones by their hash.

    Args:
        path: .jsonl with the fields prompt and completion (or question and answer, instruction
            and output or response, with an optional input) or text; or a plain .txt file.

    Returns:
        (training, held-out), each a list of {"prompt", "completion"} or {"text"}.

    Raises:
        ConfigError: the file is missing, a line is not JSON or has none of these fields, or too
            little is there to hold out a part.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; --dataset takes a .jsonl or .txt file")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".jsonl":
        rows = [
            _row(line, f"{path}:{number}")
            for number, line in enumerate(text.split("\n"), 1)  # U+2028 may stand in a string
            if line.strip()
        ]
    elif path.suffix == ".txt":
        rows = [
            {"text": text[start : start + _TEXT_CHUNK]}
            for start in range(0, len(text), _TEXT_CHUNK)
        ]
    else:
        raise ConfigError(
            f"{path}: expected a .jsonl or .txt file, found {path.suffix!r}: convert it"
        )
    training: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for row in rows:
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
        (held_out if digest[0] % _HELD_OUT_ONE_IN == 0 else training).append(row)
    if len(training) < 8 or not held_out:
        raise ConfigError(
            f"{path}: expected at least a few dozen rows, found {len(rows)}. Give more, or leave "
            "--dataset out"
        )
    return training, held_out


def _row(line: str, where: str) -> dict[str, str]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error}). Correct this line") from None
    if isinstance(record, dict):
        for prompt, completion in _PAIRS:
            if prompt in record and completion in record:
                question = str(record[prompt])
                if record.get("input"):
                    question = f"{question}\n{record['input']}"
                if not question.endswith("\n"):
                    question += "\n"
                return {"prompt": question, "completion": str(record[completion])}
        if "text" in record:
            return {"text": str(record["text"])}
    found = sorted(record) if isinstance(record, dict) else type(record).__name__
    fields = ", ".join(f"{p}+{c}" for p, c in _PAIRS)
    raise ConfigError(
        f"{where}: expected the fields text, or one of {fields}; found {found}. Rename the fields"
    )
