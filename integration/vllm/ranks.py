"""Load a checkpoint into vLLM's parallel layers on simulated ranks; run in the environment `vllm`.

    python ranks.py MODEL WEIGHTS

WEIGHTS is a safetensors file of dense W^T [K, N] in fp32, by the names of MODEL's layers. Prints
one JSON object: how many of the ranks' layers were compared, which of them are not bit-equal, which
are not after new scales and offsets have come, and what is said of experts.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config

import qalora_vllm
from qalora_kernels import PackedWeight, QuantSpec

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
QKV = ("q", "k", "v")


def make_layer(config, prefix, sizes, rank, ranks):
    """Return vLLM's layer of a Llama block, as it is made on one of several ranks."""
    kind = prefix.rpartition(".")[2]
    hidden, heads, kv_heads, intermediate = sizes
    with (
        patch.object(linear, "get_tensor_model_parallel_rank", lambda: rank),
        patch.object(linear, "get_tensor_model_parallel_world_size", lambda: ranks),
    ):
        options = {"bias": False, "quant_config": config, "prefix": prefix}
        if kind == "qkv_proj":
            width = hidden // heads
            return linear.QKVParallelLinear(hidden, width, heads, kv_heads, **options)
        if kind == "gate_up_proj":
            return linear.MergedColumnParallelLinear(hidden, [intermediate] * 2, **options)
        inputs = hidden if kind == "o_proj" else intermediate
        return linear.RowParallelLinear(inputs, hidden, **options)


def give(layer, stored, prefix):
    """Give a layer tensors of a checkpoint, as vLLM's loader does; biases are left out."""
    parent, _, kind = prefix.rpartition(".")
    for index, part in enumerate(JOINED.get(kind, (kind,))):
        shard = (QKV[index],) if kind == "qkv_proj" else (index,) if kind in JOINED else ()
        for name, tensor in stored.items():
            if name.startswith(f"{parent}.{part}.") and not name.endswith(".bias"):
                parameter = getattr(layer, name.rpartition(".")[2])
                parameter.weight_loader(parameter, tensor, *shard)


def load(layer, stored, prefix):
    """Load a layer as vLLM does."""
    give(layer, stored, prefix)
    layer.quant_method.process_weights_after_loading(layer)


def changed(stored):
    """Return a checkpoint's scales, and then its offsets, as a training might change them."""
    scales = {name: tensor * 1.25 for name, tensor in stored.items() if name.endswith(".scales")}
    offsets = {n: t - 0.125 * t.roll(1, 0) for n, t in stored.items() if n.endswith(".offsets")}
    return scales | offsets


def dense(layer):
    """Return W^T [K, N] of what a rank computes."""
    found = []
    for kernel in layer.qalora:
        tensors = (kernel.qweight, kernel.scales, kernel.offsets, kernel.g_idx)
        spec = QuantSpec(*kernel.sizes, offsets_dtype=torch.float32)
        found.append(PackedWeight(*tensors, spec).dequantize())
    return torch.cat(found, dim=1)


def expected(weights, prefix, sizes, rank, ranks):
    """Return what this rank has to compute, cut out of the dense weights."""
    parent, _, kind = prefix.rpartition(".")
    whole = [weights[f"{parent}.{part}"] for part in JOINED.get(kind, (kind,))]
    if kind not in JOINED:
        return whole[0].chunk(ranks, dim=0)[rank]
    _, _, kv_heads, _ = sizes
    pieces = (
        [ranks, min(ranks, kv_heads), min(ranks, kv_heads)] if kind == "qkv_proj" else [ranks] * 2
    )
    cut = [w.chunk(n, dim=1)[rank * n // ranks] for w, n in zip(whole, pieces, strict=True)]
    return torch.cat(cut, dim=1)


def refusal_of_experts(config):
    """Return what the config says to a layer of experts, which needs a model of its own to make."""
    try:
        config.get_quant_method(RoutedExperts.__new__(RoutedExperts), "model.layers.0.mlp.experts")
    except ValueError as error:
        return str(error)


def main(model, weights):
    described = json.loads((Path(model) / "config.json").read_text())
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = [described[key] for key in keys]
    stored, weights = load_file(Path(model) / "model.safetensors"), load_file(weights)
    qalora_vllm.register()
    config = get_quantization_config("qalora").from_config(described["quantization_config"])
    config.packed_modules_mapping = {name: list(parts) for name, parts in JOINED.items()}
    new = changed(stored)
    compared, wrong, stale = 0, [], []
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            for layer in range(described["num_hidden_layers"]):
                for last in (
                    "self_attn.qkv_proj",
                    "self_attn.o_proj",
                    "mlp.gate_up_proj",
                    "mlp.down_proj",
                ):
                    prefix = f"model.layers.{layer}.{last}"
                    made = make_layer(config, prefix, sizes, rank, ranks)
                    load(made, stored, prefix)
                    compared += 1
                    if not torch.equal(dense(made), expected(weights, prefix, sizes, rank, ranks)):
                        wrong.append(f"{prefix} on rank {rank} of {ranks}")
                    give(made, new, prefix)
                    again = make_layer(config, prefix, sizes, rank, ranks)
                    load(again, stored | new, prefix)
                    if not torch.equal(dense(made), dense(again)):
                        stale.append(f"{prefix} on rank {rank} of {ranks}")
    found = {"compared": compared, "wrong": wrong, "stale": stale}
    print(json.dumps(found | {"experts": refusal_of_experts(config)}))


if __name__ == "__main__":
    with set_current_vllm_config(VllmConfig()):
        main(*sys.argv[1:])
