"""compressed-tensors from a merged model: exact with changed scales, refused with offsets."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.random_adapter import random_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from qalora_plugin import merge_adapter, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.formats.export import export_model
from qalora_plugin.verify.export import verify_export

from .weights import ACT_ORDER, BLOCKS_OF_32, FIXTURES, STOCK, with_tokenizer


@pytest.mark.parametrize(
    ("fixture", "bits", "group_size", "symmetric"),
    [
        ("gptq_2bit_g32_asym", 4, 32, False),
        ("gptq_3bit_g32_asym", 4, 32, False),
        ("gptq_3bit_g32_sym", 4, 32, True),
        ("gptq_4bit_g32_asym", 4, 32, False),
        ("gptq_4bit_g32_asym_zero0", 4, 32, False),
        ("gptq_4bit_g32_sym", 4, 32, True),
        ("gptq_8bit_g32_asym_v2", 8, 32, False),
        ("gptq_8bit_g32_sym", 8, 32, True),
    ],
)
def test_merged_scales_are_held_exactly(fixture, bits, group_size, symmetric, tmp_path):
    base = FIXTURES / fixture
    adapter = random_adapter(open_quantized(base), tmp_path / "adapter", "scales")
    merge_adapter(adapter, tmp_path / "merged", base)
    result = export_model(tmp_path / "merged", tmp_path / "out", "compressed-tensors")
    merged = open_quantized(tmp_path / "merged")
    assert (result.layers, result.dense) == (len(merged.layers), {})
    report = verify_export(result.out, tmp_path / "merged")
    assert (report.layers, report.largest_error) == (len(merged.layers), 0)

    again = open_quantized(result.out)  # a base as well
    assert again.format == "compressed-tensors"
    for name in merged.layers:
        assert torch.equal(again.layer(name).dequantize(), merged.layer(name).dequantize())

    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    found = (weights["num_bits"], weights["group_size"], weights["symmetric"])
    assert found == (bits, group_size, symmetric) and weights["strategy"] == "group"
    tensors = load_file(result.out / "model.safetensors")
    for name, spec in merged.layers.items():
        n, k = spec.out_features, spec.in_features
        assert tensors[f"{name}.weight_packed"].shape == (n, k * bits // 32)
        assert tensors[f"{name}.weight_shape"].tolist() == [n, k]
        assert (f"{name}.weight_zero_point" in tensors) == (not symmetric)
        scales = tensors[f"{name}.weight_scale"]
        assert scales.dtype == torch.float16
        assert torch.equal(scales.t().float(), merged.layer(name).scales)


def test_one_group_short_groups_and_mixed_bits(dense_dir, tmp_path):
    options = {"method": "rtn", "zero_points": "integer"}
    quantize_model(
        dense_dir,
        tmp_path / "mixed",
        group_size=-1,
        dynamic={"*.down_proj": {"bits": 8, "group_size": 32}},
        **options,
    )
    result = export_model(tmp_path / "mixed", tmp_path / "out", "compressed-tensors")
    assert verify_export(result.out, tmp_path / "mixed").largest_error == 0
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    channel, cut = config["config_groups"].values()
    assert (channel["weights"]["strategy"], channel["weights"]["group_size"]) == ("channel", None)
    # groups of 32 in 172 inputs
    assert (cut["weights"]["num_bits"], cut["weights"]["group_size"]) == (8, 4)
    assert cut["targets"] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_a_base_of_this_format_goes_to_llama_cpp_as_it_is(tmp_path):
    """The integers have other names there than in our own format, and none may be left out."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**BLOCKS_OF_32)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    base = with_tokenizer(tmp_path / "dense", tmp_path / "model")
    quantize_model(base, tmp_path / "int", method="rtn", zero_points="integer")
    held = export_model(tmp_path / "int", tmp_path / "ct", "compressed-tensors").out
    gguf = export_model(held, tmp_path / "model.gguf", "gguf").out
    report = verify_export(gguf, held)
    assert (report.layers, report.unchecked) == (len(open_quantized(held).layers), 0)


def test_what_it_cannot_hold_is_refused_by_name(tmp_path):
    adapter = random_adapter(open_quantized(STOCK), tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged", STOCK)
    with pytest.raises(
        CheckpointError,
        match=r"not integers .*compressed-tensors stores.* --format compressed-tensors --requant",
    ):
        export_model(tmp_path / "merged", tmp_path / "out", "compressed-tensors")
    with pytest.raises(CheckpointError, match="act-order"):
        export_model(ACT_ORDER, tmp_path / "out", "compressed-tensors")
    with pytest.raises(ConfigError, match="zero-points are integers"):
        export_model(STOCK, tmp_path / "out", "compressed-tensors", requantize=True)
    assert not (tmp_path / "out").exists()


def test_requantized_and_measured(family, tmp_path, capsys):
    base = family(LlamaConfig(**BLOCKS_OF_32), 4, 32)
    random_adapter(base, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base.directory)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("One sentence after another, until there are a few windows of it. " * 40)
    command = ["export", str(tmp_path / "merged"), "--format", "compressed-tensors"]
    again = ["--requantize", "--calibration", str(text), "--samples", "4", "--seq-len", "24"]
    assert main([*command, "--out", str(out), *again, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["layers"] == len(base.layers) and result["measured"]["divergence"] > 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == []
    tensors = load_file(out / "model.safetensors")
    assert all(f"{name}.weight_zero_point" in tensors for name in base.layers)
    assert main(["verify", str(out), "--against", str(tmp_path / "merged"), "--no-run"]) == 1
    assert "Quantized again, not exact" in capsys.readouterr().err
