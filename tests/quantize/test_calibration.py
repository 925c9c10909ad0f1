"""Text to token windows."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from support.models import llama

from qalora_plugin.errors import ConfigError, QuantizationError
from qalora_plugin.quantize.calibration import (
    calibration_windows,
    check_token_ids,
    fitting_length,
)

TEXT = "def add(a, b):\n    return a + b\n"


def _windows(source, tokenizer, samples=4, seq_len=16, seed=0):
    return calibration_windows(source, tokenizer, samples=samples, seq_len=seq_len, seed=seed)


def test_rows_from_every_source_are_the_same_windows(tokenizer, tmp_path):
    rows = [{"instruction": "add two", "input": f"x{n}", "output": TEXT} for n in range(20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    want = _windows([f"add two\nx{n}\n{TEXT}" for n in range(20)], tokenizer)
    assert want.shape == (4, 16) and want.dtype == torch.int64
    for source in (rows, path, str(path), Dataset.from_list(rows)):
        assert torch.equal(_windows(source, tokenizer), want)


def test_messages_text_file_and_ids(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "add"}, {"role": "assistant", "content": TEXT}]
    windows = _windows([{"messages": chat}] * 20, tokenizer)
    assert "return a + b" in tokenizer.decode(windows.flatten())
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT * 50)
    assert _windows(path, tokenizer).shape == (4, 16)
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
        (
            DatasetDict(train=Dataset.from_list([{"text": TEXT}] * 20), test=Dataset.from_list([])),
            r"a DatasetDict with \['train', 'test'\]. Give one .* dataset\['train'\]",
        ),
        ({"text": TEXT}, r"found a dict with \['text'\]"),
        ([], "holds no text"),
        (["", "  "], "holds no text"),
        (["x"], "fewer than one window"),
        ([{"body": "x"}], r"calibration row 0: expected .* found \['body'\]"),
        (torch.zeros(2, 3), "token ids"),
        (torch.zeros(0, 3, dtype=torch.int64), "token ids"),
    ],
)
def test_unusable_data(source, message, tokenizer):
    with pytest.raises(QuantizationError, match=message):
        _windows(source, tokenizer)


def test_text_needs_a_tokenizer():
    with pytest.raises(QuantizationError, match="tokenizer"):
        _windows([TEXT], None)


@pytest.mark.parametrize("limit, asked, found", [(None, None, 512), (64, None, 64), (64, 8, 8)])
def test_length_of_a_window(limit, asked, found):
    class Config:
        max_position_embeddings = limit

        def get_text_config(self):
            return self

    assert fitting_length(Config(), asked) == found
    if limit:
        with pytest.raises(ConfigError, match="seq_len 65 is more than the 64 tokens"):
            fitting_length(Config(), 65)


@pytest.mark.parametrize("ids", [[[3, 64]], [[-1, 3]]])
def test_ids_without_an_embedding_are_refused(ids):
    with pytest.raises(QuantizationError, match=r"from 0 to 63, .* the model's own tokenizer"):
        check_token_ids(torch.tensor(ids), llama())


def test_ids_beyond_the_last_position_are_refused():
    ids = torch.zeros(2, 9, dtype=torch.int64)
    check_token_ids(ids[:, :8], llama(max_position_embeddings=8))
    with pytest.raises(ConfigError, match="seq_len 9 is more than the 8 tokens"):
        check_token_ids(ids, llama(max_position_embeddings=8))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", '[{"text": "x"}]', "a .json file .*jq -c .* rows.json"),
        ("deep.jsonl", "[" * 100_000, "deep.jsonl:1: not JSON .*nested too deeply"),
    ],
)
def test_files_that_are_no_rows(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(QuantizationError, match=message):
        _windows(path, tokenizer)
