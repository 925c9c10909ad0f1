"""What MLX itself makes of an exported directory."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.adapters import edit_json
from support.random_adapter import random_adapter

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.directory import dense_weight
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.rope import with_legacy_rope
from qalora_plugin.verify.export import verify_export

from .weights import ACT_ORDER, FIXTURES, error_in_steps

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install '.[export]'")
PARTS = ("weight", "scales", "biases")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_equal(bits, quantized, tmp_path):
    source = quantized(bits)
    result = export_model(source.directory, tmp_path / "out", "mlx")
    tensors = mx.load(str(result.out / "model.safetensors"))
    assert result.layers == 12
    assert {name.rpartition(".")[2] for name in result.dense} == {"down_proj"}  # 172 inputs
    for name in source.layers:
        weight = tensors[f"{name}.weight"]
        if name not in result.dense:
            scales, biases = tensors[f"{name}.scales"], tensors[f"{name}.biases"]
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
        found = torch.from_numpy(np.array(weight))
        assert error_in_steps(found, source, name) <= 2.0 ** (bits - 23)


def test_large_groups_are_cut(quantized, tmp_path):
    export_model(quantized(4, -1).directory, tmp_path / "out", "mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["group_size"] == 64  # of 64 inputs
    assert config["quantization"] == config["quantization_config"]


def test_groups_of_16_and_act_order_are_refused(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"groups of 16 .* 32, 64 or 128"):
        export_model(quantized(4, 16).directory, tmp_path / "out", "mlx")
    with pytest.raises(CheckpointError, match="act-order"):
        export_model(ACT_ORDER, tmp_path / "out", "mlx")
    assert not any(tmp_path.iterdir())


def test_rope_is_written_as_older_readers_know_it():
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    config = with_legacy_rope({"rope_parameters": scaled})
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    by_layer = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    config = with_legacy_rope({"rope_parameters": by_layer})
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert "rope_scaling" not in config


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlxs_own_quantization_is_read_and_goes_back_byte_by_byte(bits, dtype, tmp_path):
    """With equal weights in some groups, whose scale MLX makes 1e-7, and zeros in others."""
    source = shutil.copytree(FIXTURES / "mlx_4bit_g32_bf16_mixed", tmp_path / "mlx")
    grid = {"bits": bits, "group_size": {2: 64, 3: 128}.get(bits, 32)}
    path, generator = source / "model.safetensors", torch.Generator().manual_seed(bits)
    tensors, expected, negative = mx.load(str(path)), {}, []
    for name in [key.removesuffix(".scales") for key in tensors if key.endswith(".scales")]:
        n, groups = tensors[f"{name}.scales"].shape
        k = groups * (64 if "v_proj" in name else 32)
        weight = torch.randn(n, k, generator=generator) * 0.05
        weight[0], weight[1], weight[2] = 0.03, 0.0, -0.03
        parts = mx.quantize(mx.array(weight.numpy()).astype(getattr(mx, dtype)), **grid)
        tensors |= dict(zip((f"{name}.{p}" for p in PARTS), parts, strict=True))
        exact = [part.astype(mx.float32) for part in parts[1:]]
        expected[name] = torch.from_numpy(np.array(mx.dequantize(parts[0], *exact, **grid)))
        negative.append(np.array(exact[0]) < 0)
    assert np.concatenate([part.reshape(-1) for part in negative]).mean() > 0.3
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    edit_json(source / "config.json", quantization=grid, quantization_config=grid)

    base = open_quantized(source)
    assert base.config.scales_dtype == dtype
    for name in base.layers:
        assert torch.equal(dense_weight(base.layer(name)), expected[name]), name
    embedding = base.reader.get("model.embed_tokens.weight")
    assert torch.equal(embedding, expected["model.embed_tokens"])
    for adapt in ("zeros", "both"):
        adapter = random_adapter(base, tmp_path / f"{adapt}-adapter", adapt, size=0.0)
        merged = merge_adapter(adapter, tmp_path / f"{adapt}-merged").out
        out = export_model(merged, tmp_path / adapt, "original").out
        assert (out / "model.safetensors").read_bytes() == path.read_bytes()
    adapter = random_adapter(base, tmp_path / "adapter", size=0.5)
    merged = merge_adapter(adapter, tmp_path / "merged").out
    out = export_model(merged, tmp_path / "out", "original").out
    assert verify_export(out, merged).layers == len(base.layers)  # by MLX's dequantize
