"""The user's own file as training and held-out rows."""

import json

import pytest

from qalora_plugin.errors import ConfigError, QuantizationError
from qalora_plugin.quickstart.user_data import load_rows


def test_rows_of_a_file_are_split_and_none_is_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"{n}?", "answer": str(n), "input": "x" * (n % 2)} for n in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    training, held_out = load_rows(path)
    assert training and held_out
    found = {row["prompt"]: row["completion"] for row in training + held_out}
    assert found == {f"{n}?\n" + "x\n" * (n % 2): str(n) for n in range(60)}


@pytest.mark.parametrize(
    "name, text, error, message",
    [
        ("rows.csv", "a,b\n", ConfigError, "found '.csv': convert it"),
        ("rows.jsonl", '{"text": "a"}\n', ConfigError, "a few dozen rows, found 1. Give more"),
        ("rows.jsonl", '{"input": "a"}\n', QuantizationError, "rows.jsonl:1: expected .* Rename"),
        ("rows.jsonl", '{"messages": []}', QuantizationError, "found messages, which are not read"),
    ],
)
def test_what_cannot_be_used_is_named(name, text, error, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        load_rows(tmp_path / name)
