"""A real GGUF file as a base: SmolLM2-135M-Instruct in Q4_1."""

import filecmp

import pytest
import torch
from support.adapters import RANK, qalora_tensors, write_adapter
from support.smollm2 import find_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_plugin import export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model


@pytest.mark.slow
def test_every_weight_and_there_and_back(tmp_path):
    file = find_smollm2()
    base = import_model(file, tmp_path / "base").out
    imported = open_quantized(base)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    different = weights = 0
    for name in imported.layers:
        found = imported.layer(name).dequantize(torch.float32).t()
        different += int((found != theirs[f"{name}.weight"]).sum())
        weights += found.numel()
    assert (different, weights) == (0, 106_168_320)
    for name in imported.dense_names:
        assert torch.equal(imported.reader.get(name), theirs[name]), name
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    config = {
        "peft_type": "QALORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted(imported.layers),
        "adapt": "zeros",
    }
    zero = {name: 0 * value for name, value in qalora_tensors(imported.layers).items()}
    merged = merge_adapter(write_adapter(tmp_path / "zero", config, zero), tmp_path / "merged").out
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    assert filecmp.cmp(file, out, shallow=False)
