"""Text to token windows."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from qalora_plugin.errors import QuantizationError
from qalora_plugin.quantize.calibration import calibration_windows
from qalora_plugin.quickstart.embedded import base_model_path

TEXT = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


def _windows(source, tokenizer, samples=4, seq_len=16, seed=0):
    return calibration_windows(source, tokenizer, samples=samples, seq_len=seq_len, seed=seed)


@pytest.mark.parametrize(
    "row",
    [
        {"text": TEXT},
        {"prompt": "add two numbers", "completion": TEXT},
        {"question": "add two numbers?", "answer": TEXT},
        {"instruction": "add two numbers", "output": TEXT},
        {"messages": [{"role": "user", "content": "add"}, {"role": "assistant", "content": TEXT}]},
        {
            "prompt": [{"role": "user", "content": "add"}],
            "completion": [{"role": "assistant", "content": TEXT}],
        },
    ],
)
def test_rows_of_every_form(row, tokenizer, tmp_path):
    rows = [row] * 20
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n")
    for source in (rows, path, str(path), Dataset.from_list(rows)):
        windows = _windows(source, tokenizer)
        assert windows.shape == (4, 16) and windows.dtype == torch.int64
    assert "return a + b" in tokenizer.decode(windows.flatten())


def test_strings_text_file_and_ids(tokenizer, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 50)
    assert _windows(path, tokenizer).shape == (4, 16)
    assert _windows([TEXT] * 50, tokenizer).shape == (4, 16)
    ids = torch.arange(40).view(8, 5)
    assert torch.equal(_windows(ids, None, samples=3), ids[:3])


def test_the_seed_decides(tokenizer):
    texts = [f"value_{number} = {number}\n" * 5 for number in range(60)]
    same = _windows(texts, tokenizer), _windows(texts, tokenizer)
    assert torch.equal(*same)
    assert not torch.equal(same[0], _windows(texts, tokenizer, seed=1))


def test_a_short_text_gives_fewer_windows(tokenizer):
    windows = _windows([TEXT * 4], tokenizer, samples=1000)
    assert 1 <= len(windows) < 1000


def test_windows_begin_with_the_tokenizers_special_tokens():
    class WithSpecials:
        eos_token_id = 2

        def __call__(self, text, add_special_tokens=True, verbose=True):
            body = [10 + ord(c) for c in text]
            return {"input_ids": [1, *body, 2] if add_special_tokens else body}

    windows = _windows(["abcdef" * 20], WithSpecials(), seq_len=8)
    assert (windows[:, 0] == 1).all() and (windows[:, -1] == 2).all()
    assert windows[0, 1:-1].tolist() == [10 + ord(c) for c in "abcdef"]


@pytest.mark.parametrize(
    "source, message",
    [
        (None, "GPTQ needs text"),
        (
            DatasetDict(train=Dataset.from_list([{"text": TEXT}] * 20), test=Dataset.from_list([])),
            r"a DatasetDict with \['train', 'test'\]. Give one .* dataset\['train'\]",
        ),
        ({"text": TEXT}, r"found a dict with \['text'\]"),
        ([], "holds no text"),
        (["", "  "], "holds no text"),
        (["x"], "fewer than one window"),
        ([{"body": "x"}], r"row 0: expected .* found \['body'\]"),
        ([3], "row 0: expected .* found int"),
        ([{"messages": [{"role": "user"}]}], "row 0: expected messages"),
        ("no/such/file.jsonl", r"no/such/file\.jsonl: cannot be read"),
        (torch.zeros(2, 3), "token ids"),
        (torch.zeros(0, 3, dtype=torch.int64), "token ids"),
    ],
)
def test_unusable_data(source, message, tokenizer):
    with pytest.raises(QuantizationError, match=message):
        _windows(source, tokenizer)


def test_a_broken_line_is_named(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(QuantizationError, match=r"rows\.jsonl:3: not JSON"):
        _windows(path, tokenizer)


@pytest.mark.parametrize("samples, seq_len", [(0, 16), (4, 1)])
def test_sizes(samples, seq_len, tokenizer):
    with pytest.raises(QuantizationError, match="samples of 1 or more and seq_len of 2 or more"):
        _windows([TEXT], tokenizer, samples=samples, seq_len=seq_len)


def test_text_needs_a_tokenizer():
    with pytest.raises(QuantizationError, match="tokenizer"):
        _windows([TEXT], None)
