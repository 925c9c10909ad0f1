"""Small quantized models on disk, one for each width."""

from functools import cache

import pytest
import torch
from support.directories import edit_scales
from support.models import llama
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint

from .weights import with_tokenizer


def _quantize(
    dense,
    out,
    bits,
    group_size=32,
    mixed=None,
    offsets_at="middle",
    **tensors,
):
    """Quantize a 16-bit model; `mixed` are other bits and another group size for the v_proj."""
    dynamic = {"*.v_proj": dict(zip(("bits", "group_size"), mixed, strict=True))} if mixed else {}
    config = QALoRAQuantConfig(
        bits=bits, group_size=group_size, dynamic=dynamic, offsets_at=offsets_at
    )
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(out)
    edit_scales(out, **tensors)
    return out


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory):
    """A 16-bit Llama of two layers; 172 inputs in one of its projections."""
    directory = tmp_path_factory.mktemp("dense") / "model"
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    llama(rope_parameters=rope).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def quantized(dense_dir, tmp_path_factory):
    """`quantized(bits, group_size)`: the same, quantized, with real-valued offsets."""

    @cache
    def make(bits, group_size=32):
        out = tmp_path_factory.mktemp("base") / "quantized"
        return QuantizedCheckpoint(_quantize(dense_dir, out, bits, group_size))

    return make


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """`family(config, bits, ...)`: a quantized model of that config, with a tokenizer."""

    def make(
        config,
        bits=4,
        group_size=32,
        mixed=None,
        offsets_at="middle",
        **tensors,
    ):
        folder = tmp_path_factory.mktemp("family")
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "16")
        _quantize(folder / "16", folder / "int", bits, group_size, mixed, offsets_at, **tensors)
        return QuantizedCheckpoint(with_tokenizer(folder / "int", folder / "model"))

    return make
