"""Adapters written as files, and files of any directory changed for a test."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.fingerprint import fingerprint
from qalora_plugin.tuner.names import MATRICES

FIXTURES = Path(__file__).parents[1] / "fixtures"
PREFIX = "base_model.model."
RANK = 4


def qalora_tensors(layers, adapt="zeros"):
    """Return random matrices of rank `RANK` for these layers, by an adapter's keys."""
    gen = torch.Generator().manual_seed(1)
    tensors = {}
    for layer, spec in layers.items():
        for part, (a, b) in MATRICES.items():
            if adapt in (part, "both"):
                for matrix, shape in ((a, (RANK, spec.num_groups)), (b, (spec.out_features, RANK))):
                    values = 0.1 * torch.randn(shape, generator=gen)
                    tensors[f"{PREFIX}{layer}.{matrix}.weight"] = values
    return tensors


def write_adapter(directory, config, tensors):
    """Write an adapter directory; a QALORA adapter gets the fingerprint of the base it names."""
    named = config.get("base_model_name_or_path")
    if (
        config["peft_type"] == "QALORA"
        and "fingerprint" not in config
        and named
        and Path(named).exists()
    ):
        base = open_quantized(named)
        mark = fingerprint((name, base.qweight(name)) for name in base.layers)
        config = {**config, "fingerprint": mark}
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def rewrite(tensors, path, metadata=None):
    """Write a safetensors file anew, and drop the manifest beside it, as if there had been none."""
    save_file(tensors, path, metadata)
    path.with_name("qalora_manifest.json").unlink(missing_ok=True)


def edit_tensors(path, change):
    """Change the tensors of a safetensors file, or of an adapter, with a function of the dict.

    The manifest beside it goes, as in what earlier releases wrote.
    """
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors = load_file(path)
    change(tensors)
    rewrite(tensors, path, {"format": "pt"})


def edit_json(path, **changes):
    """Change keys of a JSON file, or of an adapter's config; a value of None removes the key."""
    if path.is_dir():
        (path / "qalora_manifest.json").unlink(missing_ok=True)
        path = path / "adapter_config.json"
    values = json.loads(path.read_text()) | changes
    removed = {key for key, value in changes.items() if value is None}
    path.write_text(json.dumps({key: v for key, v in values.items() if key not in removed}))
