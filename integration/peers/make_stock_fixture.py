"""Write the stock GPTQ checkpoints of `tests/fixtures/` and GPTQModel's own outputs for them.

    PYTHON integration/peers/make_stock_fixture.py OUT_DIR [NAME ...]

PYTHON is the one that `integration/envs/build.py gptqmodel` prints. Each fixture is a tiny Llama of
random weights and holds `reference.safetensors`, computed by GPTQModel's torch kernel in float32:
`input_ids` int64 [B, T], `logits` fp32 [B, T, vocab], and for some layers `<layer>.weight` fp32
[in_features, out_features], the dequantized weight as GPTQModel multiplies it.
"""

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Fixture:
    """What to quantize, and how.

    `positive` makes half of k_proj's outputs non-negative, so that their zero-point is 0, which the
    v1 format cannot store without a borrow.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool = False
    format: str = "gptq"
    positive: bool = False
    large: bool = False
    reference_layers: tuple[str, ...] = ("self_attn.k_proj", "self_attn.v_proj")


FIXTURES = {
    "gptq_4bit_g128_actorder_asym": Fixture(
        4, 128, False, desc_act=True, large=True, reference_layers=("layers.0.self_attn.k_proj",)
    ),
    "gptq_4bit_g32_sym": Fixture(4, 32, True),
    "gptq_4bit_g32_sym_actorder": Fixture(4, 32, True, desc_act=True),
    "gptq_4bit_g32_asym": Fixture(4, 32, False),
    "gptq_4bit_g32_asym_v2": Fixture(4, 32, False, format="gptq_v2"),
    "gptq_4bit_g32_asym_zero0": Fixture(4, 32, False, positive=True),
    "gptq_4bit_g64_asym_short": Fixture(4, 64, False, reference_layers=("mlp.down_proj",)),
    "gptq_4bit_g-1_asym": Fixture(4, -1, False),
    "gptq_2bit_g32_asym": Fixture(2, 32, False),
    "gptq_2bit_g32_sym_v2": Fixture(2, 32, True, format="gptq_v2"),
    "gptq_3bit_g32_sym": Fixture(3, 32, True),
    "gptq_3bit_g32_asym": Fixture(3, 32, False),
    "gptq_3bit_g32_asym_v2": Fixture(3, 32, False, format="gptq_v2"),
    "gptq_8bit_g32_sym": Fixture(8, 32, True),
    "gptq_8bit_g32_asym_v2": Fixture(8, 32, False, format="gptq_v2"),
}


def base_model(fixture):
    """Return a random Llama whose channels differ in size, so that act-order permutes them."""
    torch.manual_seed(0)
    hidden, intermediate, vocab = (256, 256, 128) if fixture.large else (64, 96, 32)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2 if fixture.large else 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=128,
        initializer_range=hidden**-0.5,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float16",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.exp(0.7 * torch.randn(parameter.shape)))
            if fixture.positive and "k_proj" in name:
                parameter[::2].abs_()
    return model.half()


def base_tokenizer(vocab_size):
    """Return a tokenizer of the words t0, t1, ...: GPTQModel loads no model without one."""
    vocab = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t0", eos_token="t1", pad_token="t1", unk_token="t0"
    )


def quantize(fixture, source, out):
    """Quantize the model in `source` and write GPTQModel's directory to `out`."""
    vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(1)
    calibration = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * 64}
        for ids in torch.randint(2, vocab, (32, 64), generator=generator)
    ]
    config = QuantizeConfig(
        bits=fixture.bits,
        group_size=fixture.group_size,
        sym=fixture.sym,
        desc_act=fixture.desc_act,
        act_group_aware=False,
        format=fixture.format,
        device="cpu",
        offload_to_disk=False,
        pack_impl="original",  # the default compiles a C++ extension first
    )
    model = GPTQModel.load(str(source), config, dtype=torch.float16)
    model.quantize(calibration, batch_size=8, backend=BACKEND.TORCH)
    model.save(str(out))


def load_float32(directory):
    """Return the quantized model on GPTQModel's torch kernel in float32."""
    # Left to itself it rounds the scales to bfloat16 on a CPU.
    loaded = GPTQModel.load(
        str(directory), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    return loaded.model.float().eval()


def save_reference(tensors, directory):
    """Write `reference.safetensors`."""
    assert all(t.dtype in (torch.int64, torch.float32) for t in tensors.values())
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "reference.safetensors")


def write_reference(fixture, directory):
    """Write the outputs of GPTQModel's own forward."""
    model = load_float32(directory)
    generator = torch.Generator().manual_seed(2)
    shape = (2, 24) if fixture.large else (1, 16)
    input_ids = torch.randint(2, model.config.vocab_size, shape, generator=generator)
    with torch.no_grad():
        tensors = {"input_ids": input_ids, "logits": model(input_ids).logits}
        for name, module in model.named_modules():
            if name.endswith(fixture.reference_layers):
                tensors[f"{name}.weight"] = module.dequantize_weight()
    save_reference(tensors, directory)


def make(name, out):
    """Make fixture `name` in `out / name`, replacing what was there."""
    fixture, target = FIXTURES[name], out / name
    with tempfile.TemporaryDirectory() as temporary:
        source, written = Path(temporary, "source"), Path(temporary, "written")
        model = base_model(fixture)
        model.save_pretrained(source)
        base_tokenizer(model.config.vocab_size).save_pretrained(source)
        quantize(fixture, source, written)
        (written / "quant_log.csv").unlink(missing_ok=True)  # timings: would differ at each run
        write_reference(fixture, written)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(written, target)
    size = sum(f.stat().st_size for f in target.iterdir())
    print(f"{name}: {size} bytes, {sorted(f.name for f in target.iterdir())}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIXTURES)}")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        for name in arguments.names or FIXTURES:
            make(name, out)


if __name__ == "__main__":
    main()
