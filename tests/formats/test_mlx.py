"""What MLX itself makes of an exported directory."""

import json

import numpy as np
import pytest
import torch

from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.rope import with_legacy_rope

from .weights import ACT_ORDER, error_in_steps

mx = pytest.importorskip("mlx.core", reason="needs MLX: pip install 'qalora-plugin[export]'")


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
