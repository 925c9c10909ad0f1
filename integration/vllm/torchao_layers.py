"""Load a torchao export's first attention layers by vLLM's own code; run in the environment `vllm`.

    python torchao_layers.py MODEL_DIR... -> one line of JSON: of each directory, what is raised for
                                             each layer, or null

Needs torchao beside vLLM. The layers are made and filled as vLLM does for any model; no engine is
started.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.torchao import TorchAOConfig

ATTENTION = "model.layers.0.self_attn"


def outcome(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(directory):
    config = json.loads(Path(directory, "config.json").read_text())
    quantization = TorchAOConfig.from_config(config["quantization_config"])
    with safe_open(Path(directory, "model.safetensors"), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        tensors, _ = unflatten_tensor_state_dict(stored, file.metadata())
    parts = {part: tensors[f"{ATTENTION}.{part}_proj.weight"] for part in "qkvo"}
    options = {"bias": False, "params_dtype": torch.float32, "quant_config": quantization}
    size, rows = parts["q"].shape[1], config["hidden_size"] // config["num_attention_heads"]
    heads = [parts[part].shape[0] // rows for part in "qk"]
    joined = QKVParallelLinear(size, rows, *heads, prefix=f"{ATTENTION}.qkv_proj", **options)
    shape = reversed(parts["o"].shape)
    output = RowParallelLinear(*shape, prefix=f"{ATTENTION}.o_proj", **options)
    found = {
        part: outcome(lambda part=part: joined.weight_loader(joined.weight, parts[part], part))
        for part in "qkv"
    }
    found["o"] = outcome(lambda: output.weight_loader(output.weight, parts["o"]))
    return found


if __name__ == "__main__":
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        print(json.dumps([load(directory) for directory in sys.argv[1:]]))
