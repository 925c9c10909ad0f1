"""Held-out loss of one model under several quantizers, as rows of one JSON file.

    PYTHON integration/peers/compare_quantizers.py MODEL_DIR TOKENS.safetensors ROWS.json \\
        --engine gptqmodel [--bits 4 3 2] [--group-size 32] [--desc-act] [--sym]

TOKENS holds `calibration` and `heldout`, int64 [sequences, length]. Every engine gets the same
tokens and is judged by the same float32 loss. Rows that are in ROWS.json already are kept, so
engines that need different environments fill one file: `gptqmodel` runs in the environment that
`integration/envs/build.py gptqmodel` makes, `qalora` and `none` (the 16-bit model) in .venv.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Setting:
    """One column of the comparison, in GPTQ's terms."""

    bits: int
    group_size: int | None
    desc_act: bool
    sym: bool


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, heldout: torch.Tensor) -> float:
    """Mean next-token cross entropy in nats over heldout int64 [sequences, length]."""
    losses = [model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in heldout]
    return sum(losses) / len(losses)


def quantize_gptqmodel(
    source: Path, setting: Setting, calibration: torch.Tensor
) -> torch.nn.Module:
    """GPTQModel's quantizer, then its torch kernel in float32, from the directory it wrote."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=setting.bits,
        group_size=setting.group_size,
        desc_act=setting.desc_act,
        sym=setting.sym,
        act_group_aware=not setting.desc_act,  # its default, which excludes desc_act
        device="cpu",
        offload_to_disk=False,
        pack_impl="original",  # the default compiles a C++ extension first
    )
    examples = [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in calibration
    ]
    model = GPTQModel.load(str(source), config, dtype=torch.float32)
    model.quantize(examples, batch_size=4, backend=BACKEND.TORCH)
    model.save("quantized")
    # Left to itself it rounds the scales to bfloat16 on a CPU.
    loaded = GPTQModel.load("quantized", backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    return loaded.model.float()


def quantize_qalora(source: Path, setting: Setting, calibration: torch.Tensor) -> torch.nn.Module:
    """This project's quantizer with its defaults; its offsets are real numbers, never `sym`."""
    from qalora_plugin import quantize_model

    if setting.sym:
        raise SystemExit("engine qalora has no symmetric grid: leave --sym out")
    quantize_model(
        source,
        "quantized",
        bits=setting.bits,
        group_size=setting.group_size,
        desc_act=setting.desc_act,
        calibration=calibration,
        progress=False,
    )
    return AutoModelForCausalLM.from_pretrained("quantized", dtype=torch.float32)


def quantize_none(source: Path, setting: Setting, calibration: torch.Tensor) -> torch.nn.Module:
    """The model as it is: the loss that a quantizer can at best keep."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


ENGINES = {
    "none": ("transformers", quantize_none),
    "qalora": ("qalora-plugin", quantize_qalora),
    "gptqmodel": ("gptqmodel", quantize_gptqmodel),
}


def measure(engine: str, source: Path, setting: Setting, tokens: Path) -> dict[str, Any]:
    """Quantize, reload, evaluate: one row."""
    distribution, quantize = ENGINES[engine]
    data = load_file(tokens)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        start = time.monotonic()
        model = quantize(source, setting, data["calibration"]).eval()
        seconds = time.monotonic() - start
        loss = heldout_loss(model, data["heldout"])
    return {
        "engine": engine,
        "version": importlib.metadata.version(distribution),
        "bits": setting.bits,
        "group_size": setting.group_size,
        "desc_act": setting.desc_act,
        "sym": setting.sym,
        "heldout_loss": round(loss, 6),
        "seconds": round(seconds, 1),
        "model": source.name,
        "calibration_tokens": data["calibration"].numel(),
        "heldout_tokens": data["heldout"].numel(),
    }


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Put `row` into the JSON list at `path`, in the place of one with the same setting."""
    key = ("engine", "version", "bits", "group_size", "desc_act", "sym", "model")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--sym", action="store_true")
    arguments = parser.parse_args()

    source, tokens, rows = (
        p.resolve() for p in (arguments.model_dir, arguments.tokens, arguments.rows)
    )
    for bits in [16] if arguments.engine == "none" else arguments.bits:
        group_size = None if arguments.engine == "none" else arguments.group_size
        setting = Setting(bits, group_size, arguments.desc_act, arguments.sym)
        row = measure(arguments.engine, source, setting, tokens)
        add_row(rows, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
