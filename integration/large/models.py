"""Models of Llama-2-7B's widths with random numbers: ours, a GGUF file, and an adapter."""

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from support.gguf_files import SIZES, tokens, write_header
from transformers import LlamaConfig

from qalora_kernels import QuantSpec
from qalora_kernels.stored import layer_plan
from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.architecture.model import empty_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.fingerprint import combine, mark
from qalora_plugin.checkpoint.layout import guard_tensor
from qalora_plugin.files.atomic import AtomicDirectory
from qalora_plugin.files.json import write_json
from qalora_plugin.files.writer import bound_to, write_weights

RANK = 16
_BLOCK = 20  # bytes of 32 weights in Q4_1


def write_base(out, layers):
    """Write a base in our format, 4 bits in groups of 32; 32 layers are 4.4 GB."""
    config = LlamaConfig(num_hidden_layers=layers, dtype="float16")  # its widths are the default
    model = empty_model(config)
    generator = torch.Generator().manual_seed(0)
    plan, specs = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            spec = QuantSpec(4, 32, module.in_features, module.out_features)
            plan |= layer_plan(name, spec, desc_act=False)
            specs[name] = spec
        elif hasattr(module, "weight"):
            plan[f"{name}.weight"] = (torch.float16, tuple(module.weight.shape))

    def tensors(name):
        if name not in specs:
            shape = plan[f"{name}.weight"][1]
            return {f"{name}.weight": torch.randn(shape, generator=generator).half()}
        made = {f"{name}.weight": guard_tensor(specs[name].in_features)}
        for part, (dtype, shape) in ((p, plan[f"{name}.{p}"]) for p in ("scales", "offsets")):
            values = torch.rand(shape, generator=generator) * 0.01 + 0.001
            made[f"{name}.{part}"] = values.to(dtype)
        shape = plan[f"{name}.qweight"][1]
        integers = (-(2**31), 2**31 - 1, shape)
        made[f"{name}.qweight"] = torch.randint(*integers, generator=generator, dtype=torch.int32)
        return made

    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    quantization = QALoRAQuantConfig(bits=4, group_size=32, modules_to_not_convert=["lm_head"])
    values["quantization_config"] = quantization.to_dict()
    with AtomicDirectory(out) as partial:
        write_weights(partial, plan, {}, tensors, metadata=bound_to(values))
        write_json(partial / "config.json", values)
    return out


def write_adapter(base, out):
    """Write an adapter of random numbers for every quantized layer, as PEFT lays it out."""
    source, tensors = open_quantized(base), {}
    for name, spec in source.layers.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.qalora_A.weight"] = torch.randn(RANK, spec.num_groups) * 1e-2
        tensors[f"{key}.qalora_B.weight"] = torch.randn(spec.out_features, RANK) * 1e-2
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = QALoRAConfig(r=RANK, lora_alpha=RANK, base_model_name_or_path=str(base))
    config.bits, config.group_size = source.config.bits, source.config.group_size
    marks = (mark(name, source.qweight(name)) for name in source.layers)
    config.fingerprint = combine(marks)
    config.save_pretrained(out)
    return out


def write_gguf(path, layers):
    """Write a GGUF file of random Q4_1 blocks; 32 layers are 4.2 GB."""
    SIZES.update({"width": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128, "ff": 11008})
    SIZES["layers"] = layers
    names, _ = tokens()
    names += [f"word{i}" for i in range(32000 - len(names))]
    writer = gguf.GGUFWriter(path, "llama")
    types = [3, 3, 4, *[1] * 31997]
    shapes = write_header(
        writer, **{"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types}
    )
    gen = np.random.default_rng(0)
    for name, shape in shapes.items():
        kind, width = ("F32", 4 * shape[0])
        if len(shape) > 1:
            kind, width = "Q4_1", shape[1] // 32 * _BLOCK
        stored = (*shape[:-1], width)
        writer.add_tensor_info(
            name, stored, np.uint8, int(np.prod(stored)), gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32))
            continue
        raw = gen.integers(0, 256, (*shape[:-1], shape[1] // 32, _BLOCK), dtype=np.uint8)
        for at, middle in ((0, 0.005), (2, -0.04)):
            numbers = gen.uniform(0.5, 1.5, raw.shape[:2]).astype(np.float32) * middle
            raw[..., at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
        writer.write_tensor_data(raw.reshape(len(raw), -1))
    writer.close()
    return path
