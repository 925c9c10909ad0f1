"""Models on disk that several tests read."""

import pytest
from support.architectures import save
from support.models import llama
from transformers import AutoTokenizer

from qalora_plugin.quickstart.embedded import base_model_path


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory):
    """A tiny Llama of random weights, without a tokenizer."""
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text_model_dir(tmp_path_factory, tokenizer):
    """A tiny Llama of random weights with the tokenizer of the embedded model."""
    directory = tmp_path_factory.mktemp("models") / "text"
    llama(vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
