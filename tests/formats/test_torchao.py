"""What torchao itself makes of an exported directory."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import TorchAoConfig

from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.export import export_model

from .weights import ACT_ORDER, error_in_steps

pytest.importorskip("torchao", reason="needs torchao: pip install '.[export]'")


def dequantized(directory):
    """Every tensor of a directory as torchao reads and dequantizes it."""
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        result, left = unflatten_tensor_state_dict(tensors, file.metadata())
    assert not left
    return {
        name: value.dequantize() if type(value) is not torch.Tensor else value
        for name, value in result.items()
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_equal(bits, quantized, tmp_path):
    source = quantized(bits)
    result = export_model(source.directory, tmp_path / "out", "torchao")
    assert (result.layers, result.dense) == (14, {})
    weights = dequantized(result.out)
    for name in source.layers:  # down_proj has 172 inputs: its last group is short
        assert error_in_steps(weights[f"{name}.weight"], source, name) <= 2.0 ** (bits - 23)
    for name in source.dense_names:
        assert torch.equal(weights[name], source.reader.get(name))


def test_act_order_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="act-order"):
        export_model(ACT_ORDER, tmp_path / "out", "torchao")
    assert not any(tmp_path.iterdir())


def test_quant_config_is_what_torchao_writes(quantized, tmp_path):
    export_model(quantized(3).directory, tmp_path / "out", "torchao")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = TorchAoConfig.from_dict(dict(written)).to_dict()
    assert parsed["quant_type"]["default"]["_type"] == "IntxWeightOnlyConfig"
    assert parsed["quant_type"]["default"]["_data"]["weight_dtype"]["_data"] == "int7"  # for vLLM
