"""Held-out loss of one model under several quantizers, as rows of one JSON file.

    PYTHON integration/peers/compare_quantizers.py MODEL_DIR TOKENS.safetensors ROWS.json \\
        --engine gptqmodel [--bits 4 3 2] [--draws 0 1 2 3 4] [--group-size 32] [--desc-act] [--sym]

TOKENS holds `calibration`, int64 [draws, sequences, length], and `heldout`, int64 [sequences,
length], with `labels` of that shape where only some tokens are judged (-100: not). Every engine
gets the same tokens and is judged by the same float32 loss, and by the mean KL divergence of its
next-token distributions from the 16-bit model's. What stands in ROWS.json already is not measured
again: a run that was cut short goes on, and engines that need different environments fill one file:
`gptqmodel` runs in the environment that `integration/envs/build.py gptqmodel` makes, `qalora`,
`qalora-minimum` (with offsets_at "minimum"), `none` (the 16-bit model) and `softened` (the same,
less sure of itself) in .venv.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

IGNORED = -100  # as in transformers
SOFTENING = 1.1


@dataclass(frozen=True)
class Setting:
    """One column of the comparison, in GPTQ's terms."""

    bits: int
    group_size: int | None
    desc_act: bool
    sym: bool
    draw: int


@torch.no_grad()
def judge(
    model: torch.nn.Module,
    original: torch.nn.Module,
    heldout: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[float, float]:
    """Mean next-token cross entropy, and KL(original || model), in nats over the tokens of
    `heldout` that have a label; both int64 [sequences, length]."""
    loss = divergence = 0.0
    for ids, wanted in zip(heldout, labels[:, 1:], strict=True):
        judged = wanted != IGNORED
        ours = model(input_ids=ids[None]).logits[0, :-1][judged].float().log_softmax(-1)
        theirs = original(input_ids=ids[None]).logits[0, :-1][judged].float().log_softmax(-1)
        loss += functional.nll_loss(ours, wanted[judged], reduction="sum").item()
        divergence += functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    count = int((labels[:, 1:] != IGNORED).sum())
    return loss / count, divergence / count


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


def quantize_qalora(
    source: Path,
    setting: Setting,
    calibration: torch.Tensor,
    offsets_at: Literal["middle", "minimum"] = "middle",
) -> torch.nn.Module:
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
        offsets_at=offsets_at,
        calibration=calibration,
        progress=False,
    )
    return AutoModelForCausalLM.from_pretrained("quantized", dtype=torch.float32)


def quantize_none(source: Path, setting: Setting, calibration: torch.Tensor) -> torch.nn.Module:
    """The model as it is: the loss that a quantizer can at best keep."""
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def soften(source: Path, setting: Setting, calibration: torch.Tensor) -> torch.nn.Module:
    """The model with its logits divided by `SOFTENING`: its loss is lower where it is too sure."""
    model = quantize_none(source, setting, calibration)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight / SOFTENING)  # a new one: it may be tied
    return model


ENGINES = {
    "none": ("transformers", quantize_none),
    "softened": ("transformers", soften),
    "qalora": ("qalora-plugin", quantize_qalora),
    "qalora-minimum": ("qalora-plugin", functools.partial(quantize_qalora, offsets_at="minimum")),
    "gptqmodel": ("gptqmodel", quantize_gptqmodel),
}


def identity(engine: str, source: Path, setting: Setting, tokens: Path) -> dict[str, Any]:
    """What tells a row from all others."""
    version = importlib.metadata.version(ENGINES[engine][0])
    common = {"engine": engine, "version": version, "model": source.name, "text": tokens.stem}
    return common | asdict(setting)


def measure(engine: str, source: Path, setting: Setting, tokens: Path) -> dict[str, Any]:
    """Quantize, reload, evaluate: one row."""
    quantize = ENGINES[engine][1]
    data = load_file(tokens)
    calibration = data["calibration"][setting.draw]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        start = time.monotonic()
        model = quantize(source, setting, calibration).eval()
        seconds = time.monotonic() - start
        heldout = data["heldout"]
        labels = data.get("labels", heldout)
        loss, divergence = judge(
            model, quantize_none(source, setting, calibration), heldout, labels
        )
    return identity(engine, source, setting, tokens) | {
        "heldout_loss": round(loss, 6),
        "heldout_kl": round(divergence, 6),
        "seconds": round(seconds, 1),
        "calibration_tokens": calibration.numel(),
        "heldout_tokens": int((labels != IGNORED).sum()),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--sym", action="store_true")
    arguments = parser.parse_args()

    source, tokens, rows = (
        p.resolve() for p in (arguments.model_dir, arguments.tokens, arguments.rows)
    )
    is_quantized = arguments.engine not in ("none", "softened")
    group_size = arguments.group_size if is_quantized else None
    for draw in arguments.draws if is_quantized else [0]:
        for bits in arguments.bits if is_quantized else [16]:
            setting = Setting(bits, group_size, arguments.desc_act, arguments.sym, draw)
            known = identity(arguments.engine, source, setting, tokens).items()
            if any(known <= row.items() for row in read_rows(rows)):
                continue
            row = measure(arguments.engine, source, setting, tokens)
            write_rows(rows, [*read_rows(rows), row])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
