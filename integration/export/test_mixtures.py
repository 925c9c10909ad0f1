"""Merged mixtures of experts in mlx-lm and llama.cpp."""

import shutil

import pytest
import torch
from support.mixtures import mixture
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.format import format_named
from qalora_plugin.formats.export import export_model
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.verify.runtime import check_runtime

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe")


def merge(name, folder, **settings):
    """Make a merged mixture in 4 bits, with the quickstart's tokenizer."""
    mixture(name, inner=96, vocab_size=2048).save_pretrained(folder / "16")
    grid = QALoRAQuantConfig(bits=4, group_size=32, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder / "16", quantization_config=grid)
    model.save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base_model_path() / name, folder / "base")
    random_adapter(open_quantized(folder / "base"), folder / "adapter", size=0.05)
    merge_adapter(folder / "adapter", folder / "merged", folder / "base")
    return folder / "merged"


@pytest.fixture(scope="module", params=FAMILIES)
def merged(request, tmp_path_factory):
    return merge(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", ["mlx", "gguf"])
def test_runtime(name, merged, env_python, tmp_path):
    """Logits within the bound of `qalora verify`; without the experts they are others."""
    format = format_named(name)
    out = tmp_path / f"model{format.suffix}"
    export_model(merged, out, name)
    report = check_runtime(out, merged, format, env_python("export"))
    print(f"{merged.parent.name}: {report.as_text()}")
    assert report.not_run is None and report.difference <= report.allowed < 0.3
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        whole = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.experts.forward = lambda hidden, *routing: hidden
        assert (model(ids).logits - whole).abs().mean() > 0.3


def test_a_layer_whose_experts_stay_in_16_bits_runs_in_mlx(env_python, tmp_path):
    merged = merge("mixtral", tmp_path, modules_to_not_convert=["layers.0"])
    assert export_model(merged, tmp_path / "mlx", "mlx").layers == 28
    report = check_runtime(tmp_path / "mlx", merged, format_named("mlx"), env_python("export"))
    assert report.not_run is None and report.difference <= report.allowed < 0.3
