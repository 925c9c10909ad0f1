"""One tiny Llama for every test that needs a model."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 172,  # no multiple of 32: the last group is short
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def llama_config(**changes):
    """Return the config of a Llama of two layers; keywords replace entries of `SIZES`."""
    return LlamaConfig(**SIZES | changes)


def llama(seed=0, **changes):
    """Return a Llama of random weights; keywords as `llama_config` takes them."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes))
