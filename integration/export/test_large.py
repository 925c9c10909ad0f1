"""A 1.1B-parameter model is exported in 60 seconds and 1 GB of memory."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qalora_kernels import QuantSpec
from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.checkpoint.layout import TensorPlan, guard_tensor, layer_plan
from qalora_plugin.files.writer import CheckpointWriter, split_plan

SECONDS, MEMORY = 60.0, 1.0e9
FREE_DISK = 6e9
RANK = 16
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


def write_model(out: Path) -> dict[str, QuantSpec]:
    """A quantized model of random numbers, and an adapter for it beside."""
    out.mkdir()
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(CONFIG).state_dict().items()}
    plan: TensorPlan = {}
    layers = {}
    for name, shape in shapes.items():
        if name.endswith("_proj.weight"):
            layer = name.removesuffix(".weight")
            layers[layer] = QuantSpec(4, 32, shape[1], shape[0])
            plan.update(layer_plan(layer, layers[layer], False))
        else:
            plan[name] = (torch.bfloat16, tuple(shape))
    writer = CheckpointWriter(out, split_plan(plan, 1 << 30))
    for index, names in enumerate(writer.plans):
        with writer.shard(index) as shard:
            for name in names:
                dtype, shape = plan[name]
                if dtype == torch.int32:
                    tensor = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
                elif shape == (1,):
                    tensor = guard_tensor(layers[name.removesuffix(".weight")].in_features)
                elif name.endswith("scales"):
                    tensor = torch.full(shape, 0.003, dtype=dtype)
                else:
                    tensor = torch.empty(shape, dtype=dtype).normal_(0, 0.002)
                shard.write(name, tensor)
    writer.finish()
    options = QALoRAQuantConfig(4, 32, modules_to_not_convert=["lm_head"]).to_dict()
    text = json.dumps(CONFIG.to_dict() | {"quantization_config": options})
    (out / "config.json").write_text(text)
    return layers


def write_tokenizer(out: Path) -> None:
    """A byte-level tokenizer of 32000 tokens without merges."""
    vocab = {chr(0x4E00 + i) if i >= 256 else chr(256 + i): i for i in range(20000)}
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (out / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": pre}))


def write_adapter(base: Path, layers: dict[str, QuantSpec], out: Path) -> None:
    """An adapter of random numbers for every quantized layer."""
    tensors = {}
    for name, spec in layers.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.qalora_A.weight"] = torch.randn(RANK, spec.num_groups)
        tensors[f"{key}.qalora_B.weight"] = torch.randn(spec.out_features, RANK)
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    QALoRAConfig(r=RANK, base_model_name_or_path=str(base), bits=4, group_size=32).save_pretrained(
        out
    )


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `adapter`."""
    folder = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(folder).free < FREE_DISK:
        pytest.fail(f"needs {FREE_DISK / 1e9:.0f} GB of free disk in {folder}")
    layers = write_model(folder / "model")
    assert len(layers) == 154
    write_tokenizer(folder / "model")
    write_adapter(folder / "model", layers, folder / "adapter")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gguf", "mlx", "torchao", "lora"])
def test_export_is_fast_and_small(
    format: str,
    large: Path,
    env_python: Callable[[str], Path],
    project_path: Path,
    tmp_path: Path,
) -> None:
    source = large / ("adapter" if format == "lora" else "model")
    out = tmp_path / "out.gguf"
    command = [env_python("export"), "-P", "-m", "qalora_plugin", "export", source]
    started = time.monotonic()
    process = subprocess.Popen(
        [*map(str, command), "--format", format, "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(project_path)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    size = sum(f.stat().st_size for f in ([out] if out.is_file() else out.iterdir()))
    print(json.dumps({"format": format, "s": seconds, "peak_gb": peak / 1e9, "gb": size / 1e9}))
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    assert os.waitstatus_to_exitcode(status) == 0
    assert seconds <= SECONDS
    assert peak <= MEMORY
