"""A quantized checkpoint of random numbers, of any size, written tensor by tensor."""

import torch
from transformers import AutoModelForCausalLM

from qalora_kernels.stored import TensorPlan, layer_plan
from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.architecture.selection import linears_to_quantize
from qalora_plugin.checkpoint.layout import guard_tensor
from qalora_plugin.files.writer import CheckpointWriter, split_plan


def random_checkpoint(config, out):
    """Write a causal LM in bf16 with INT-4 layers in groups of 32, and return its directory."""
    grid = QALoRAQuantConfig(bits=4, group_size=32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = linears_to_quantize(model)
    plan: TensorPlan = {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in linears:
            sizes = linears[layer].in_features, linears[layer].out_features
            plan |= layer_plan(layer, grid.spec_for(layer, *sizes), desc_act=False)
        else:
            plan[name] = (torch.bfloat16, tuple(parameter.shape))
    out.mkdir()
    generator = torch.Generator().manual_seed(0)
    writer = CheckpointWriter(out, split_plan(plan, 1 << 30))
    for index, names in enumerate(writer.plans):
        with writer.shard(index) as shard:
            for name, (dtype, shape) in names.items():
                tensor = torch.empty(shape, dtype=dtype)
                if dtype == torch.int32:
                    tensor.random_(-(2**31), 2**31, generator=generator)
                elif shape == (1,):
                    tensor = guard_tensor(linears[name.removesuffix(".weight")].in_features)
                elif name.endswith(".scales"):
                    tensor.fill_(0.003)
                else:
                    tensor.normal_(float("norm" in name), 0.002, generator=generator)
                shard.write(name, tensor)
    writer.finish()
    config.quantization_config = grid.to_dict() | {"base": {"fingerprint": "0" * 32}}
    config.save_pretrained(out)
    return out
