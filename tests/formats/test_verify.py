"""`verify_export`: an export passes, a changed one does not."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.adapters import edit_json, edit_tensors, rewrite
from support.random_adapter import random_adapter
from transformers import LlamaConfig, Qwen2Config

from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, VerificationError
from qalora_plugin.formats.export import export_model
from qalora_plugin.verify.export import verify_export

from .weights import SIZES, STOCK

REASON = "needs the format's library: pip install '.[export]'"
LIBRARIES = {"mlx": "mlx.core", "torchao": "torchao", "gguf": "gguf", "onnx": "onnx_ir"}


@pytest.fixture(scope="module")
def source(family):
    """A Qwen2, which has biases; 172 inputs in one projection."""
    return family(Qwen2Config(**SIZES), 3, 32, (4, 32))


@pytest.mark.parametrize("format", ["mlx", "torchao", "gguf"])
def test_export_is_verified_and_a_change_is_found(format, source, tmp_path):
    pytest.importorskip(LIBRARIES[format], reason=REASON)
    out = tmp_path / ("model.gguf" if format == "gguf" else "model")
    export_model(source.directory, out, format)
    report = verify_export(out, source.directory)
    assert (report.format, report.layers, report.unchecked) == (format, 7, 0)
    assert report.other_tensors == len(source.dense_names)
    assert report.largest_error < (4e-3 if format == "gguf" else 1e-5)
    change_one_code(out, format)
    with pytest.raises(VerificationError, match=r"differ by more than the rounding"):
        verify_export(out, source.directory)


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.0.attn_q.weight"])
def test_a_tensor_that_a_gguf_file_lacks(name, source, tmp_path):
    out = tmp_path / "model.gguf"
    export_model(source.directory, out, "gguf")
    content = out.read_bytes()
    assert content.count(name.encode()) == 1
    out.write_bytes(content.replace(name.encode(), name.upper().encode()))
    with pytest.raises(VerificationError, match=f"expected {name} for .*found none"):
        verify_export(out, source.directory)


def test_a_tensor_that_a_torchao_directory_lacks(source, tmp_path):
    pytest.importorskip(LIBRARIES["torchao"], reason=REASON)
    path = export_model(source.directory, tmp_path / "model", "torchao").out / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    rewrite(tensors, path, metadata)
    with pytest.raises(VerificationError, match=r"for model\.norm\.weight of .*found none"):
        verify_export(tmp_path / "model", source.directory)


def change_one_code(out, format):
    """Flip the lowest bit of one integer of a layer."""
    if format == "gguf":
        from gguf import GGUFReader

        tensors = {tensor.name: tensor for tensor in GGUFReader(out, "r+").tensors}
        tensors["blk.0.attn_q.weight"].data[0, 4] ^= 1  # a memory map
        return
    from safetensors import safe_open

    path = out / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    part = {"mlx": "weight", "torchao": "_weight_qdata"}[format]
    codes = tensors[f"model.layers.0.self_attn.q_proj.{part}"].view(torch.int8)
    codes[0, 0] ^= 1
    rewrite(tensors, path, metadata)


def test_onnx(source, tmp_path):
    pytest.importorskip(LIBRARIES["onnx"], reason=REASON)
    export_model(source.directory, tmp_path / "model", "onnx")
    report = verify_export(tmp_path / "model", source.directory)
    assert (report.layers, report.unchecked) == (7, len(source.dense_names))
    assert 0 < report.largest_error < 1e-5
    data = np.memmap(tmp_path / "model" / "model.onnx.data", dtype=np.uint8, mode="r+")
    data[:] ^= 1
    data.flush()
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data: XXH3-128"):
        verify_export(tmp_path / "model", source.directory)
    (tmp_path / "model" / "qalora_manifest.json").unlink()
    with pytest.raises(VerificationError, match="differ by more than the rounding"):
        verify_export(tmp_path / "model", source.directory)


def test_another_models_tensors_are_found(family, source, tmp_path):
    pytest.importorskip(LIBRARIES["torchao"], reason=REASON)
    export_model(source.directory, tmp_path / "model", "torchao")
    path = tmp_path / "model" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    rewrite(tensors, path, metadata)
    with pytest.raises(VerificationError, match=r"model\.norm\.weight differs"):
        verify_export(tmp_path / "model", source.directory)


def test_gptq_and_command(tmp_path, capsys):
    export_model(STOCK, tmp_path / "gptq", "gptq")
    command = ["verify", str(tmp_path / "gptq"), "--against", str(STOCK)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["largest_error"] < 1e-5) == ("gptq", True)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("scales"))
    tensors[name][0, 0] *= 1.01
    rewrite(tensors, tmp_path / "gptq" / "model.safetensors", {"format": "pt"})
    assert main(command) == 1
    assert "differ by more than the rounding of gptq" in capsys.readouterr().err


def test_lora(family, tmp_path):
    adapter = random_adapter(family(LlamaConfig(**SIZES)), tmp_path / "adapter")
    export_model(adapter, tmp_path / "lora", "lora")
    report = verify_export(tmp_path / "lora", adapter)
    assert (report.format, report.layers) == ("lora", 7)
    assert report.largest_error < 1e-12
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] += 0.01
    rewrite(tensors, path)
    with pytest.raises(VerificationError, match="something else than the adapter"):
        verify_export(tmp_path / "lora", adapter)


@pytest.mark.parametrize("what", ["a whole tensor", "alpha_pattern"])
def test_what_else_a_lora_adapter_has(what, quantized, tmp_path):
    source, head = quantized(4), "base_model.model.lm_head.weight"
    adapter, out = random_adapter(source, tmp_path / "adapter"), tmp_path / "lora"
    edit_tensors(adapter, lambda t: t.update({head: torch.ones(64, 64)}))
    edit_json(adapter, modules_to_save=["lm_head"], alpha_pattern={"q_proj": 16})
    export_model(adapter, out, "lora")
    assert verify_export(out, adapter).other_tensors == 1
    if what == "a whole tensor":
        edit_tensors(out, lambda t: t[head][0].fill_(2))
    else:
        edit_json(out, alpha_pattern={"q_proj": 8})
    with pytest.raises(VerificationError, match=r"lm_head.weight is missing|alpha_pattern: expect"):
        verify_export(out, adapter)


def test_a_model_is_no_export(source, tmp_path):
    with pytest.raises(CheckpointError, match="none: no such file or directory"):
        verify_export(tmp_path / "none", source.directory)
    with pytest.raises(CheckpointError, match="not what `qalora export` writes"):
        verify_export(source.directory, source.directory)
