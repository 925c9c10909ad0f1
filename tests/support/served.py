"""Models for inference engines: random ones whose groups no rank's part fits, and merged ones."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.quickstart.embedded import base_model_path
from support.random_adapter import random_adapter

SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 172,  # a short last group; no rank's part of it starts at a group
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def random_model(folder, config, *, biases=False):
    """Write a model of random weights, quantized, whose groups are short and cut by any rank."""
    torch.manual_seed(0)
    model = (
        Qwen2ForCausalLM(Qwen2Config(**SIZES)) if biases else LlamaForCausalLM(LlamaConfig(**SIZES))
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # 0.02 would make every logit alike
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    load = AutoModelForCausalLM.from_pretrained
    load(folder / "dense", quantization_config=config).save_pretrained(folder / "model")
    return folder / "model"


def merged_quickstart(folder, config):
    """Write the quickstart's base, quantized; an adapter of random numbers; and both merged."""
    load, source = AutoModelForCausalLM.from_pretrained, base_model_path()
    load(source, quantization_config=config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "base")
    random_adapter(open_quantized(folder / "base"), folder / "adapter", rank=8, alpha=8, size=0.05)
    merge_adapter(folder / "adapter", folder / "merged", folder / "base")
    return folder


def with_act_order(source, target):
    """Copy a checkpoint with its inputs dealt out to the groups at random."""
    shutil.copytree(source, target)
    state = load_file(target / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    orders = {}
    for name in [name for name in state if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        parent, k = layer.rpartition(".")[0], int(state[f"{layer}.weight"].item())
        groups = state[f"{layer}.scales"].shape[0]
        if (parent, k, groups) not in orders:  # as in GPTQ: one order for one input
            order = torch.arange(k, dtype=torch.int32) % groups
            orders[parent, k, groups] = order[torch.randperm(k, generator=generator)]
        state[f"{layer}.g_idx"] = orders[parent, k, groups].clone()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return change_config(target, desc_act=True)


def change_config(directory, **values):
    """Change entries of a checkpoint's quantization_config."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(values)
    file.write_text(json.dumps(config))
    return directory
