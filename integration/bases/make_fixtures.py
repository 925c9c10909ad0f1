"""Write the quantized models of `tests/fixtures/` that come from other programs than GPTQModel.

    PYTHON integration/bases/make_fixtures.py OUT_DIR [NAME ...]

PYTHON is the one that `integration/envs/build.py bases` prints. Each fixture is a tiny Llama of
random weights, packed by the library that owns its format, and holds `reference.safetensors`: for
every quantized layer `<layer>.weight` fp32 [N, K], as the library dequantizes it in fp32.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Fixture:
    """What to quantize, and how; `group_size` -1 is one group for an output."""

    format: str
    bits: int
    group_size: int
    sym: bool = False
    dtype: torch.dtype = torch.float16


FIXTURES = {
    "ct_4bit_g32_asym": Fixture("compressed-tensors", 4, 32),
    "ct_4bit_g32_sym_bf16": Fixture("compressed-tensors", 4, 32, sym=True, dtype=torch.bfloat16),
    "ct_8bit_channel_asym": Fixture("compressed-tensors", 8, -1),
    "ct_3bit_g16_asym": Fixture("compressed-tensors", 3, 16),
    "awq_4bit_g32_asym": Fixture("awq", 4, 32),
    "autoround_4bit_g32_asym": Fixture("auto_round", 4, 32),
    "autoround_3bit_g32_sym": Fixture("auto_round:auto_gptq", 3, 32, sym=True),
    "autoround_8bit_g32_asym": Fixture("auto_round:auto_gptq", 8, 32),
    "autoround_awq_4bit_g32_asym": Fixture("auto_round:auto_awq", 4, 32),
}


def base_model(dtype):
    """Return a random Llama whose channels differ in size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=128,
        initializer_range=0.125,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.exp(0.7 * torch.randn(parameter.shape)))
    return model.to(dtype)


def quantized_layers(model):
    """Return the linear layers of the blocks by name."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: linear for name, linear in linears.items() if "layers" in name}


def compressed_tensors(fixture, out):
    """Quantize with compressed-tensors' own observer formula, and write what it compresses."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = base_model(fixture.dtype)
    channel = fixture.group_size == -1
    weights = {
        "num_bits": fixture.bits,
        "type": "int",
        "symmetric": fixture.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else fixture.group_size,
    }
    group = {"targets": ["Linear"], "weights": weights}
    config = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    apply_quantization_config(model, QuantizationConfig(**config))
    for layer in quantized_layers(model).values():
        size = layer.in_features if channel else fixture.group_size
        groups = layer.weight.float().unflatten(1, (layer.in_features // size, size))
        args = layer.quantization_scheme.weights
        scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
        layer.weight_scale.data.copy_(scale)
        if not fixture.sym:
            layer.weight_zero_point.data.copy_(zero)
        layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)


def compressed_tensors_weights(fixture, directory):
    """Return every layer's weight as compressed-tensors decompresses it."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    found = {}
    for name, parts in tensors_by_layer(directory, "weight_packed").items():
        parts["weight_scale"] = parts["weight_scale"].float()
        found[f"{name}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return found


def awq(fixture, out):
    """Pack with AutoAWQ's layer for its GEMM kernel."""
    gemm = autoawq("modules.linear.gemm").WQLinear_GEMM

    def packed(linear, scales, zeros):
        arguments = (linear, fixture.bits, fixture.group_size, False)
        return gemm.from_linear(*arguments, scales.t().contiguous(), zeros.t().contiguous())

    config = {"quant_method": "awq", "version": "gemm", "zero_point": True}
    pack_layers(fixture, out, packed, config)


def autoawq(name):
    """Import one module of AutoAWQ, whose own __init__ needs an older transformers."""
    if "awq" not in sys.modules:
        root = importlib.util.find_spec("awq").submodule_search_locations[0]
        for package in ("awq", "awq.modules", "awq.modules.linear"):
            module = sys.modules[package] = types.ModuleType(package)
            module.__path__ = [str(Path(root, *package.split(".")[1:]))]
    return importlib.import_module(f"awq.{name}")


def awq_weights(fixture, directory):
    """Return every layer's weight as AutoAWQ dequantizes it."""
    dequantize = autoawq("utils.packing_utils").dequantize_gemm
    return {
        f"{name}.weight": dequantize(
            parts["qweight"], parts["qzeros"], parts["scales"].float(), 4, fixture.group_size
        ).t()
        for name, parts in tensors_by_layer(directory, "qweight").items()
    }


def auto_round(fixture, out):
    """Pack with the layer that AutoRound chooses for this packing."""

    def packed(linear, scales, zeros):
        sizes = (linear.in_features, linear.out_features)
        layer = auto_round_layer(fixture, *sizes)
        if "awq" in fixture.format:
            arguments = (linear, fixture.bits, fixture.group_size, False)
            return layer.from_linear(*arguments, scales.t().contiguous(), zeros.t().contiguous())
        layer.device = "cpu"
        layer.pack(linear, scales, zeros, None, device="cpu")
        return layer

    config = {"quant_method": "auto-round", "packing_format": fixture.format, "data_type": "int"}
    pack_layers(fixture, out, packed, config)


def auto_round_layer(fixture, in_features, out_features):
    """Return AutoRound's empty layer for a packing."""
    from auto_round.export.export_to_autoround.export import (
        dynamic_import_quant_linear_for_packing,
    )

    grid = (fixture.bits, fixture.group_size)
    layer = dynamic_import_quant_linear_for_packing(fixture.format, *grid, fixture.sym)
    return layer(*grid, in_features, out_features, False, "cpu")


def auto_round_weights(fixture, directory):
    """Return every layer's weight: AutoRound's layer in fp32 on the identity."""
    found = {}
    for name, parts in tensors_by_layer(directory, "qweight").items():
        groups, n = parts["scales"].shape
        k = groups * fixture.group_size
        layer = auto_round_layer(fixture, k, n)
        layer.load_state_dict(parts)
        layer.scales = layer.scales.float()
        if "awq" in fixture.format:
            from auto_round.export.export_to_awq.utils import dequantize_gemm

            grid = (fixture.bits, fixture.group_size)
            weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, *grid)
        else:
            weight = layer(torch.eye(k))
        found[f"{name}.weight"] = weight.t()
    return found


def pack_layers(fixture, out, packed, config):
    """Round every layer of the blocks to its range, and replace it by what `packed` makes of it."""
    model, top = base_model(fixture.dtype), 2**fixture.bits - 1
    for name, linear in quantized_layers(model).items():
        shape = (linear.in_features // fixture.group_size, fixture.group_size)
        groups = linear.weight.float().unflatten(1, shape)
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scales = ((high - low) / top).half().float()
        zeros = (-low / scales).round().clamp(1, top)
        if fixture.sym:
            scales = (groups.abs().amax(2) / 2 ** (fixture.bits - 1)).half().float()
            zeros = torch.full_like(scales, 2 ** (fixture.bits - 1))
        codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, top)
        weight = (codes - zeros[..., None]) * scales[..., None]
        linear.weight.data = weight.flatten(1)
        model.set_submodule(name, packed(linear, scales, zeros))
    grid = {"bits": fixture.bits, "group_size": fixture.group_size, "sym": fixture.sym}
    model.config.quantization_config = {**config, **grid}
    model.save_pretrained(out)


def tensors_by_layer(directory, marker):
    """Return {layer: {part: tensor}} of the layers that have a part called `marker`."""
    layers = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    return {layer: parts for layer, parts in layers.items() if marker in parts}


MAKERS = {
    "compressed-tensors": (compressed_tensors, compressed_tensors_weights),
    "awq": (awq, awq_weights),
    "auto_round": (auto_round, auto_round_weights),
}


def make(name, out):
    """Make fixture `name` in `out / name`, replacing what was there."""
    fixture, target = FIXTURES[name], out / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write, read = MAKERS[fixture.format.partition(":")[0]]
    write(fixture, target)
    reference = {key: value.float().contiguous() for key, value in read(fixture, target).items()}
    assert len(reference) == 7
    save_file(reference, target / "reference.safetensors")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{name}: {size} bytes, {sorted(path.name for path in target.iterdir())}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIXTURES)}")
    arguments = parser.parse_args()
    for name in arguments.names or FIXTURES:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
