"""The tokenizer of a GGUF file, rebuilt from its lists."""

import pytest
from support.gguf_files import TEMPLATE, sentencepiece, tokens, write_gguf
from transformers import AutoTokenizer

from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.errors import CheckpointError


def test_tokenizer_is_the_files_own(tmp_path):
    base = import_model(write_gguf(tmp_path / "model.gguf"), tmp_path / "base").out
    made = AutoTokenizer.from_pretrained(base)
    assert (made.bos_token, made.eos_token) == ("<|user|>", "<|end|>")
    assert made.chat_template == TEMPLATE
    names = tokens()[0]
    ids = made("the cat and 123<tool>\n<|end|>").input_ids
    expected = ["the", "Ġ", "c", "a", "t", "Ġand", "Ġ", "1", "2", "3", "<tool>", "Ċ", "<|end|>"]
    assert [names[i] for i in ids] == expected
    assert made.decode(ids) == "the cat and 123<tool>\n<|end|>"


def test_tokenizer_with_scores(tmp_path):
    pieces, scores, types = sentencepiece()
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.eos_token_id": 2,
    }
    base = import_model(write_gguf(tmp_path / "model.gguf", **fields), tmp_path / "base").out
    made = AutoTokenizer.from_pretrained(base)
    ids = made("the and é").input_ids
    found = [pieces[i] for i in ids]
    assert found == ["<s>", "▁the", "▁and", "▁", "<0xC3>", "<0xA9>"]
    assert made.eos_token == "</s>" and made.decode(ids[1:]) == "the and é"


def test_a_merge_of_no_token_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **{"tokenizer.ggml.merges": ["nothing here"]})
    with pytest.raises(CheckpointError, match=r"no tokenizer can be made .*out of vocabulary"):
        import_model(path, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_without_a_list_of_types_all_tokens_are_normal(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **{"tokenizer.ggml.token_type": None})
    made = AutoTokenizer.from_pretrained(import_model(path, tmp_path / "base").out)
    names = tokens()[0]
    assert [names[i] for i in made("the cat").input_ids] == ["the", "Ġ", "c", "a", "t"]
