"""Fixtures of small models on disk, for conftest.py to import."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig
from support.models import llama


def unbound(directory):
    """Return a model directory once nothing says any more for which config it was written."""
    for path in directory.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    (directory / "qalora_manifest.json").unlink(missing_ok=True)
    return directory


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory):
    """A 16-bit Llama of two layers; 172 inputs in one of its projections."""
    directory = tmp_path_factory.mktemp("dense") / "model"
    llama().to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def base_dir(dense_dir, tmp_path_factory):
    """The same, quantized while loading and saved: 4 bits, groups of 32."""
    directory = tmp_path_factory.mktemp("base") / "model"
    config = QALoRAQuantConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def altered(tmp_path):
    """Copy a directory; `tensors` changes its state dict, `config` its quantization_config.

    Its tensors are then bound to no config, as in what earlier releases wrote.
    """

    def alter(
        source,
        tensors=None,
        **config,
    ):
        target = tmp_path / "altered"
        shutil.copytree(source, target)
        unbound(target)
        if tensors is not None:
            state = load_file(target / "model.safetensors")
            tensors(state)
            save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((target / "config.json").read_text())
        values["quantization_config"].update(config)
        (target / "config.json").write_text(json.dumps(values))
        return target

    return alter


def edit_scales(directory, dtype=torch.float16):
    """Make half of a quantized model's scales negative, as in MLX, and one of each layer 0.

    With another `dtype` scales, and minima, are of that.
    """
    path, config_path = directory / "model.safetensors", directory / "config.json"
    tensors, config = load_file(path), json.loads(config_path.read_text())
    quantization = config["quantization_config"]
    for name in tensors:
        if name.endswith(".scales"):
            tensors[name][:, 1::2] *= -1
            tensors[name][-1, -2] = 0
            tensors[name] = tensors[name].to(dtype)
        elif name.endswith(".offsets") and quantization.get("offsets_at") == "minimum":
            tensors[name] = tensors[name].to(dtype)
    quantization["scales_dtype"] = str(dtype).removeprefix("torch.")
    save_file(tensors, path, metadata={"format": "pt"})
    config_path.write_text(json.dumps(config))
