"""The user's own file as training and held-out rows."""

import json

import pytest

from qalora_plugin.errors import ConfigError
from qalora_plugin.quickstart.user_data import load_rows


def test_rows_of_a_file_are_split_and_none_is_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    # a line separator of Unicode is no end of a line of JSON
    rows = [{"question": f"{n}\u2028?", "answer": str(n)} for n in range(60)]
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\r\n".join(lines), encoding="utf-8")
    training, held_out = load_rows(path)
    assert training and held_out
    found = sorted((row["prompt"], row["completion"]) for row in training + held_out)
    assert found == sorted((f"{row['question']}\n", row["answer"]) for row in rows)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("rows.csv", "a,b\n", "found '.csv': convert it"),
        ("rows.jsonl", '{"text": "a"}\n{', "rows.jsonl:2: not JSON .* Correct this line"),
        ("rows.jsonl", '{"input": "a"}\n', "rows.jsonl:1: expected the fields .* Rename"),
        ("rows.jsonl", '{"text": "a"}\n', "a few dozen rows, found 1. Give more"),
    ],
)
def test_what_cannot_be_used_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_rows(tmp_path / name)
