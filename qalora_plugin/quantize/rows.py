"""Rows of data sets: which fields hold an example, and how a file becomes rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import QuantizationError
from ..files.json import parse_json

# the parts of one example, tried in this order; a pair's first part may have an `input` beside it
_FIELDS: tuple[tuple[str, ...], ...] = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "response"),
    ("prompt", "chosen"),
    ("text",),
    ("messages",),
)


def fields_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the fields that hold the row's example, in order; () if none do."""
    for fields in _FIELDS:
        if all(row.get(name) is not None for name in fields):
            has_input = len(fields) == 2 and row.get("input") not in (None, "")
            return (fields[0], "input", fields[1]) if has_input else fields
    return ()


def read_row(row: Any, where: str, tokenizer: Any = None) -> dict[str, str]:
    """Return the example that a row holds.

    Args:
        row: a string, or a dict with the fields text, messages, prompt and completion (or chosen,
            or response), question and answer, or instruction and output (or response); beside a
            prompt, question or instruction an `input`, which becomes its next line.
        where: file and line, or number, for messages.
        tokenizer: of transformers, for messages: its chat template is used. None refuses them.

    Returns:
        {"prompt": str, "completion": str}, or {"text": str} where the row does not tell them apart.

    Raises:
        QuantizationError: the row has none of these fields, or holds messages in another form, or
            ones that the chat template refuses.
    """
    if isinstance(row, str):
        return {"text": row}
    names = fields_of(row) if isinstance(row, dict) else ()
    parts = [row[name] for name in names]
    if not parts:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        known = ", ".join("+".join(fields) for fields in _FIELDS)
        raise QuantizationError(
            f"{where}: expected a string or one of the fields {known}; found {found}. "
            "Rename the fields"
        )
    if any(isinstance(part, list) for part in parts):
        return {"text": _conversation(parts, where, tokenizer)}
    *prompt, last = map(str, parts)
    return {"prompt": "\n".join(prompt), "completion": last} if prompt else {"text": last}


def _conversation(parts: list[Any], where: str, tokenizer: Any) -> str:
    if tokenizer is None:
        raise QuantizationError(
            f"{where}: expected text, found messages, which are not read here. Give strings"
        )
    if not all(isinstance(part, list) for part in parts):
        raise QuantizationError(
            f"{where}: expected text or messages, found some of each. Make all its fields messages"
        )
    messages = [message for part in parts for message in part]
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise QuantizationError(
            f'{where}: expected messages of the form {{"role": ..., "content": "text"}}'
        )
    if getattr(tokenizer, "chat_template", None):
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # of a template, which may refuse a role or an order
            raise QuantizationError(
                f"{where}: expected messages that the tokenizer's chat template takes, found ones "
                f"that it refuses ({error}). Change them, or give the text itself as `text`"
            ) from error
    return "\n".join(message["content"] for message in messages)


def file_rows(path: Path, piece: int) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) for every line of a .jsonl file, or `piece` characters of a text file.

    Raises:
        QuantizationError: the file cannot be read, or is not UTF-8, or a line is not JSON.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")  # with or without Windows' mark
    except OSError as error:
        raise QuantizationError(
            f"{path}: cannot be read ({error.strerror}). Give a .txt or .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise QuantizationError(
            f"{path}: byte {error.start} is not UTF-8 text ({error.reason}). Give a .txt or .jsonl "
            f"file, or convert it, such as with `iconv -f latin1 -t utf-8`"
        ) from None
    if path.suffix == ".json":
        raise QuantizationError(
            f"{path}: a .json file would be taken for plain text. Give a .jsonl file, one row a "
            f"line; of a list of rows `jq -c '.[]' {path.name}` makes one"
        )
    if path.suffix != ".jsonl":
        for start in range(0, len(content), piece):
            yield str(path), content[start : start + piece]
        return
    for number, line in enumerate(content.split("\n"), 1):  # U+2028 may stand in a string
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", parse_json(line)
        except ValueError as error:
            raise QuantizationError(
                f"{path}:{number}: not JSON ({error}). Correct this line"
            ) from None
