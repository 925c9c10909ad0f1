"""Models of random weights: TinyLlama's 1.1B shape, and a GGUF file in Llama-2-7B's."""

import os

import gguf
import numpy as np
import pytest
import torch
from support.gguf_files import SIZES, tokens, write_header
from transformers import AutoModelForCausalLM, LlamaConfig

_BLOCK = 20  # bytes of 32 weights in Q4_1


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
    SIZES.update({"width": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128, "ff": 11008})
    SIZES["layers"] = int(os.environ["QALORA_LARGE_BLOCKS"])
    names, _ = tokens()
    names += [f"word{i}" for i in range(32000 - len(names))]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    types = [3, 3, 4, *[1] * 31997]
    shapes = write_header(
        writer, **{"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types}
    )
    gen = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind, width = ("F32", 4 * shape[0])
        if len(shape) > 1:
            kind, width = "Q4_1", shape[1] // 32 * _BLOCK
        stored = (*shape[:-1], width)
        writer.add_tensor_info(
            name, stored, np.uint8, int(np.prod(stored)), gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32))
            continue
        raw = gen.integers(0, 256, (*shape[:-1], shape[1] // 32, _BLOCK), dtype=np.uint8)
        for at, middle in ((0, 0.005), (2, -0.04)):
            numbers = gen.uniform(0.5, 1.5, raw.shape[:2]).astype(np.float32) * middle
            raw[..., at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
        writer.write_tensor_data(raw.reshape(len(raw), -1))
    writer.close()
    return tmp_path / "model.gguf"
