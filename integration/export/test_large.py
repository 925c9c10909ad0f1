"""A 1.1B-parameter model is exported in 60 seconds and 1 GB of memory."""

import json
import shutil
import time

import pytest
from support.peak import peak_of
from support.random_adapter import random_adapter
from support.random_model import random_checkpoint
from transformers import LlamaConfig

from qalora_plugin.checkpoint.checkpoint import open_quantized

SECONDS, MEMORY = 60.0, 1.0e9
FREE_DISK = 6e9
# TinyLlama-1.1B
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


def write_tokenizer(out):
    """Write a byte-level tokenizer without merges."""
    vocab = {chr(0x4E00 + i) if i >= 256 else chr(256 + i): i for i in range(20000)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (out / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": pre}))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return a folder with `model` and `adapter`."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < FREE_DISK:
        pytest.fail(f"needs {FREE_DISK / 1e9:.0f} GB of free disk in {folder}")
    base = open_quantized(random_checkpoint(CONFIG, folder / "model"))
    assert len(base.layers) == 154
    write_tokenizer(base.directory)
    random_adapter(base, folder / "adapter", rank=16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gguf", "mlx", "torchao", "lora"])
def test_export_is_fast_and_small(
    format,
    large,
    env_python,
    project_path,
    tmp_path,
):
    source = large / ("adapter" if format == "lora" else "model")
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    command = ("-P", "-m", "qalora_plugin", "export", source, "--format", format, "--out", out)
    started = time.monotonic()
    peak = peak_of(format, *command, python=env_python("export"), PYTHONPATH=str(project_path))
    seconds = time.monotonic() - started
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert seconds <= SECONDS
    assert peak <= MEMORY
