"""Write a Llama of random weights, TinyLlama's 1.1B shape, in bf16 shards, a block at a time."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

BLOCKS_A_SHARD = 4
STD = 0.02
ALL_BLOCKS = 22


def shape_1b(blocks: int = ALL_BLOCKS) -> LlamaConfig:
    """TinyLlama-1.1B's config: 1.1e9 parameters with all its blocks, grouped-query attention."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_llama(out: Path, config: LlamaConfig, seed: int = 0) -> int:
    """Write config, shards and index to `out`; returns the number of parameters."""
    out.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
        }
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shard = f"blocks{int(parts[2]) // BLOCKS_A_SHARD:03d}" if "layers" in parts else parts[-2]
        shards.setdefault(shard, []).append(name)
    weight_map = {}
    for shard, names in shards.items():
        file = f"model-{shard}.safetensors"
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if "norm" in name
            else (torch.randn(shapes[name], generator=generator) * STD).to(torch.bfloat16)
            for name in names
        }
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(shape.numel() for shape in shapes.values())


@pytest.fixture
def llama_1b(tmp_path: Path) -> Path:
    """Directory of TinyLlama-1.1B's shape with random weights in bf16 shards, no tokenizer.

    Memory is bounded by one block and the embeddings, so a few blocks show it; all of them take
    GPTQ the better part of an hour on a busy machine: QALORA_LARGE_BLOCKS=22 asks for them.
    """
    if "QALORA_LARGE_BLOCKS" not in os.environ:
        pytest.skip("takes many minutes: set QALORA_LARGE_BLOCKS=22 (or fewer) to measure")
    blocks = int(os.environ["QALORA_LARGE_BLOCKS"])
    make_llama(tmp_path / "base", shape_1b(blocks))
    return tmp_path / "base"
