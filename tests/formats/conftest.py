"""Small quantized models on disk, one for each width."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint, open_quantized

from .weights import with_tokenizer


def quantization(
    bits: int, group_size: int, mixed: tuple[int, int] | None, offsets_at: str
) -> QALoRAQuantConfig:
    """`mixed` are other bits and another group size for the v_proj."""
    dynamic = {"*.v_proj": dict(zip(("bits", "group_size"), mixed, strict=True))} if mixed else {}
    return QALoRAQuantConfig(
        bits=bits, group_size=group_size, dynamic=dynamic, offsets_at=offsets_at
    )


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Llama of two layers; 172 inputs in one of its projections."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
    )
    directory = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def quantized(
    dense_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., QuantizedCheckpoint]:
    """`quantized(bits, group_size, mixed)`: the same, quantized, with real-valued offsets.

    `mixed` are other bits and another group size for the v_proj.
    """

    @cache
    def make(
        bits: int, group_size: int = 32, mixed: tuple[int, int] | None = None
    ) -> QuantizedCheckpoint:
        out = tmp_path_factory.mktemp("base") / "quantized"
        dynamic = (
            {"*.v_proj": dict(zip(("bits", "group_size"), mixed, strict=True))} if mixed else {}
        )
        config = QALoRAQuantConfig(bits=bits, group_size=group_size, dynamic=dynamic)
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config).save_pretrained(
            out
        )
        return open_quantized(out)

    return make


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., QuantizedCheckpoint]:
    """`family(config, bits, group_size)`: a quantized model of that config, with a tokenizer."""

    def make(
        config: PreTrainedConfig,
        bits: int = 4,
        group_size: int = 32,
        mixed: tuple[int, int] | None = None,
        offsets_at: str = "middle",
    ) -> QuantizedCheckpoint:
        folder = tmp_path_factory.mktemp("family")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "16")
        options = quantization(bits, group_size, mixed, offsets_at)
        AutoModelForCausalLM.from_pretrained(
            folder / "16", quantization_config=options
        ).save_pretrained(folder / "int")
        return QuantizedCheckpoint(with_tokenizer(folder / "int", folder / "model"))

    return make
