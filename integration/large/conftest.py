"""Models of random weights: TinyLlama's 1.1B shape, and a GGUF file in Llama-2-7B's."""

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from .models import write_gguf


@pytest.fixture
def llama_1b(tmp_path):
    """Directory of TinyLlama-1.1B's shape with random weights in bf16 shards, no tokenizer.

    Memory is bounded by one block and the embeddings, so a few blocks show it; all of them take
    GPTQ the better part of an hour on a busy machine: QALORA_LARGE_BLOCKS=22 asks for them.
    """
    if "QALORA_LARGE_BLOCKS" not in os.environ:
        pytest.skip("takes many minutes: set QALORA_LARGE_BLOCKS=22 (or fewer) to measure")
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=int(os.environ["QALORA_LARGE_BLOCKS"]),
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="400MB")
    return tmp_path / "base"


@pytest.fixture
def gguf_7b(tmp_path):
    """Write a GGUF file in Llama-2-7B's shape, 4.4 GB of random Q4_1 blocks."""
    if "QALORA_LARGE_BLOCKS" not in os.environ:
        pytest.skip("takes minutes and 25 GB: set QALORA_LARGE_BLOCKS=32 (or fewer) to measure")
    return write_gguf(tmp_path / "model.gguf", int(os.environ["QALORA_LARGE_BLOCKS"]))
