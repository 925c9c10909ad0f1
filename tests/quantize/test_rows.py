"""Which fields of a row hold its example, and rows of files."""

import json

import pytest
from jinja2 import TemplateError

from qalora_plugin.errors import QuantizationError
from qalora_plugin.quantize.rows import file_rows, read_row

PAIR = {"prompt": "ask", "completion": "say"}
TURNS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]


class Plain:
    """A tokenizer without a chat template."""


class WithTemplate:
    chat_template = "..."

    def apply_chat_template(self, messages, tokenize):
        return "|".join(f"{message['role']}:{message['content']}" for message in messages)


@pytest.mark.parametrize(
    "row, example",
    [
        ("words", {"text": "words"}),
        ({"text": "words", "prompt": None}, {"text": "words"}),
        ({"prompt": "ask", "completion": "say", "text": "both"}, PAIR),
        ({"question": "ask", "answer": "say"}, PAIR),
        ({"question": 1, "answer": 2}, {"prompt": "1", "completion": "2"}),
        ({"instruction": "ask", "output": "say", "input": ""}, PAIR),
        (
            {"instruction": "ask", "output": "say", "input": "that"},
            {"prompt": "ask\nthat", "completion": "say"},
        ),
        ({"instruction": "ask", "response": "say"}, PAIR),
        ({"prompt": "ask", "response": "say"}, PAIR),
        ({"prompt": "ask", "chosen": "say", "rejected": "no"}, PAIR),
    ],
)
def test_fields(row, example):
    assert read_row(row, "row 0") == example


@pytest.mark.parametrize(
    "row", [{"messages": TURNS}, {"prompt": TURNS[:1], "completion": TURNS[1:]}]
)
def test_messages_become_text(row):
    assert read_row(row, "row 0", WithTemplate()) == {"text": "user:ask|assistant:say"}
    assert read_row(row, "row 0", Plain()) == {"text": "ask\nsay"}
    with pytest.raises(QuantizationError, match="row 0: expected text, found messages"):
        read_row(row, "row 0")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"body": "x"}, r"row 7: expected a string or .*question\+answer.* found \['body'\]"),
        (3, "row 7: expected .* found int"),
        ({"messages": [{"role": "user"}]}, "row 7: expected messages of the form"),
    ],
)
def test_other_rows_are_named(row, message):
    with pytest.raises(QuantizationError, match=message):
        read_row(row, "row 7", Plain())


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    # a line separator of Unicode is no end of a line of JSON
    rows = [{"text": "a\u2028b"}, "c"]
    path.write_text("\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert list(file_rows(path, 3)) == [(f"{path}:1", rows[0]), (f"{path}:3", rows[1])]
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(QuantizationError, match=r"rows\.jsonl:3: not JSON .* Correct this line"):
        list(file_rows(path, 3))


def test_pieces_of_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh")
    assert [piece for _, piece in file_rows(path, 3)] == ["abc", "def", "gh"]
    with pytest.raises(QuantizationError, match=r"none\.txt: cannot be read .* Give a \.txt or"):
        list(file_rows(tmp_path / "none.txt", 3))
    path.write_bytes("\ufeffab".encode())  # as Windows' editors write it
    assert [piece for _, piece in file_rows(path, 3)] == ["ab"]
    path.write_bytes("aä".encode("latin-1"))
    with pytest.raises(QuantizationError, match=r"text\.txt: byte 1 is not UTF-8 text"):
        list(file_rows(path, 3))


TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "completion": "text"},
        {"prompt": "text", "completion": TURNS},
        {"prompt": TURNS, "completion": TURNS, "input": "text"},
        {"instruction": "text", "output": TURNS},
        {"instruction": TURNS, "input": "text", "output": "text"},
    ],
)
def test_text_beside_messages_is_not_lost(row):
    with pytest.raises(QuantizationError, match="some of each"):
        read_row(row, "row 0", tokenizer=object())


@pytest.mark.parametrize("value", [0, 1.5, False, "0", " "])
def test_any_input_is_kept(value):
    row = {"instruction": "add", "input": value, "output": "sum"}
    assert read_row(row, "row 0") == {"prompt": f"add\n{value}", "completion": "sum"}


def test_messages_that_a_template_refuses_name_their_row():
    class Strict(WithTemplate):
        def apply_chat_template(self, messages, tokenize):
            raise TemplateError("System role not supported")

    with pytest.raises(QuantizationError, match=r"rows.jsonl:3: .*System role not supported"):
        read_row({"messages": TURNS}, "rows.jsonl:3", Strict())
