"""Write the MLX directories of `tests/fixtures/` with mlx-lm, and what MLX makes of them.

    PYTHON integration/peers/make_mlx_fixture.py OUT_DIR [NAME ...]

PYTHON is the one that `integration/envs/build.py export` prints. Each fixture is a tiny Llama of
random weights, quantized and written by `mlx_lm.convert`, and holds `reference.safetensors`,
computed by MLX in float32: `input_ids` int64 [B, T], `logits` fp32 [B, T, vocab], and for every
quantized module `<module>.weight` fp32 [out_features, in_features].
"""

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from mlx.nn import QuantizedEmbedding, QuantizedLinear
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96


@dataclass(frozen=True)
class Fixture:
    """What to quantize, and how; `mixed` gives some modules other bits and groups, one none."""

    bits: int
    group_size: int
    dtype: str
    tied: bool = False
    mixed: bool = False


FIXTURES = {
    "mlx_2bit_g64_fp16": Fixture(2, 64, "float16"),
    "mlx_3bit_g128_bf16": Fixture(3, 128, "bfloat16", tied=True),
    "mlx_4bit_g32_bf16_mixed": Fixture(4, 32, "bfloat16", tied=True, mixed=True),
    "mlx_6bit_g64_bf16": Fixture(6, 64, "bfloat16"),
    "mlx_8bit_g64_fp16": Fixture(8, 64, "float16"),
}


def write_source(fixture, directory):
    """Write a random Llama with a tokenizer of the words t0, t1, ..., as transformers does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=fixture.tied,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
        dtype=fixture.dtype,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, fixture.dtype))
    model.save_pretrained(directory)
    vocab = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t0", eos_token="t1", pad_token="t1", unk_token="t0"
    )
    fast.save_pretrained(directory)


def choose_grid(path, module):
    """Return the grid of one module of a mixed model: as mlx-lm's own recipes give more bits."""
    if "v_proj" in path:
        return {"group_size": 64, "bits": 8}
    if "k_proj" in path:
        return False
    return {"group_size": 32, "bits": 6} if "embed" in path else True


def write_reference(directory):
    """Write what MLX dequantizes and computes, in float32."""
    model, _ = mlx_lm.load(str(directory))
    model.set_dtype(mx.float32)
    ids = np.arange(2 * 12, dtype=np.int64).reshape(2, 12) * 7 % VOCABULARY
    tensors = {"input_ids": ids, "logits": np.array(model(mx.array(ids)))}
    for name, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            grid = {"group_size": module.group_size, "bits": module.bits}
            value = mx.dequantize(module.weight, module.scales, module.biases, **grid)
            tensors[f"{name}.weight"] = np.array(value)
    assert all(value.dtype in (np.int64, np.float32) for value in tensors.values())
    # every eighth row is enough, and small
    short = {k: v if v.ndim != 2 or k == "input_ids" else v[::8] for k, v in tensors.items()}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in short.items()}, directory / "reference.safetensors"
    )


def make(name, out):
    """Make fixture `name` in `out / name`, replacing what was there."""
    fixture, target = FIXTURES[name], out / name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        write_source(fixture, source)
        mlx_lm.convert(
            str(source),
            str(target),
            quantize=True,
            q_bits=fixture.bits,
            q_group_size=fixture.group_size,
            dtype=fixture.dtype,
            quant_predicate=choose_grid if fixture.mixed else None,
        )
    (target / "README.md").unlink(missing_ok=True)
    write_reference(target)
    size = sum(f.stat().st_size for f in target.iterdir())
    print(f"{name}: {size} bytes, {sorted(f.name for f in target.iterdir())}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIXTURES)}")
    arguments = parser.parse_args()
    for name in arguments.names or FIXTURES:
        make(name, arguments.out.resolve())


if __name__ == "__main__":
    main()
