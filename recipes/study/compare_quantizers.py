"""Held-out loss of one model under several quantizers.

    PYTHON recipes/study/compare_quantizers.py MODEL_DIR TOKENS.safetensors --engine gptqmodel \\
        [--bits 4 3 2] [--draws 0 1 2 3 4] [--group-size 32] [--desc-act] [--sym] \\
        [--refine-rate R] [--refine-steps N] [--refine-norms] [--rows FILE]

TOKENS holds `calibration`, int64 [draws, sequences, length], and `heldout`, int64 [sequences,
length], with `labels` of that shape where only some tokens are judged (-100: not). Every engine
gets the same tokens and is judged by the same float32 loss, and by the mean KL divergence of its
next-token distributions from the 16-bit model's. Engines that need different environments fill one
data file: `gptqmodel` runs in the environment that `integration/envs/build.py gptqmodel` makes,
`qalora`, `qalora-minimum` (with offsets_at "minimum"), `qalora-refined`, `qalora-auto` (bits of
each layer, as large as `--bits` everywhere), `none` (the 16-bit model) and `softened` (the same,
less sure of itself) in .venv.
"""

import argparse
import contextlib
import importlib.metadata
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import session
import torch
from rows import RESULTS, Row
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

IGNORED = -100  # as in transformers
SOFTENING = 1.1


def quantize_gptqmodel(source: Path, setting: Row, calibration: torch.Tensor) -> torch.nn.Module:
    """Quantize with GPTQModel, and return what it wrote on its torch kernel in float32."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        **{name: setting[name] for name in ("bits", "group_size", "desc_act", "sym")},
        act_group_aware=not setting["desc_act"],  # its default, which excludes desc_act
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


def quantize_qalora(source: Path, setting: Row, calibration: torch.Tensor) -> torch.nn.Module:
    """Quantize with this project's defaults; its offsets are real numbers, never `sym`."""
    from qalora_plugin import quantize_model

    if setting["sym"]:
        raise SystemExit("engine qalora has no symmetric grid: leave --sym out")
    options = {name: setting[name] for name in ("bits", "group_size", "desc_act")}
    if setting["engine"] == "qalora-minimum":
        options["offsets_at"] = "minimum"
    if setting["engine"] == "qalora-refined":
        options |= {"refine": True} | {k: v for k, v in setting.items() if k.startswith("refine_")}
    if setting["engine"] == "qalora-auto":
        options |= {"bits": "auto", "target_bits": float(setting["bits"])}
    quantize_model(source, "quantized", calibration=calibration, progress=False, **options)
    return AutoModelForCausalLM.from_pretrained("quantized", dtype=torch.float32)


def keep(source: Path, setting: Row, calibration: torch.Tensor) -> torch.nn.Module:
    """Return the model as it is, or `softened`: with its logits divided by `SOFTENING`."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if setting["engine"] == "softened":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight / SOFTENING)  # a new one: it may be tied
    return model


ENGINES = {
    "none": ("transformers", keep),
    "softened": ("transformers", keep),
    "qalora": ("qalora-plugin", quantize_qalora),
    "qalora-minimum": ("qalora-plugin", quantize_qalora),
    "qalora-refined": ("qalora-plugin", quantize_qalora),
    "qalora-auto": ("qalora-plugin", quantize_qalora),
    "gptqmodel": ("gptqmodel", quantize_gptqmodel),
}


@torch.no_grad()
def judge(
    model: torch.nn.Module, original: torch.nn.Module, heldout: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """Return the mean next-token cross entropy and KL(original || model), in nats.

    Both are over the tokens of `heldout`, int64 [sequences, length], that have a label.
    """
    loss = divergence = 0.0
    for ids, wanted in zip(heldout, labels[:, 1:], strict=True):
        judged = wanted != IGNORED
        ours = model(input_ids=ids[None]).logits[0, :-1][judged].float().log_softmax(-1)
        theirs = original(input_ids=ids[None]).logits[0, :-1][judged].float().log_softmax(-1)
        loss += functional.nll_loss(ours, wanted[judged], reduction="sum").item()
        divergence += functional.kl_div(ours, theirs, reduction="sum", log_target=True).item()
    count = int((labels[:, 1:] != IGNORED).sum())
    return loss / count, divergence / count


def measured(source: Path, tokens: Path, setting: Row, folder: Path) -> list[Row]:
    """Quantize, reload and judge a model; return the row."""
    data = load_file(tokens)
    calibration, heldout = data["calibration"][setting["draw"]], data["heldout"]
    labels = data.get("labels", heldout)
    # GPTQModel writes its logs into the working directory
    with tempfile.TemporaryDirectory(dir=folder) as scratch, contextlib.chdir(scratch):
        start = time.monotonic()
        model = ENGINES[setting["engine"]][1](source, setting, calibration).eval()
        seconds = time.monotonic() - start
        original = keep(source, {"engine": "none"}, calibration)
        loss, divergence = judge(model, original, heldout, labels)
    figures = {
        "heldout_loss": round(loss, 6),
        "heldout_kl": round(divergence, 6),
        "seconds": round(seconds, 1),
        "calibration_tokens": calibration.numel(),
        "heldout_tokens": int((labels != IGNORED).sum()),
    }
    return [setting | figures]


def settings(arguments: argparse.Namespace) -> list[Row]:
    """Return what is to be measured, each setting as the entries that tell its row from others."""
    common = {
        "engine": arguments.engine,
        "version": importlib.metadata.version(ENGINES[arguments.engine][0]),
        "model": arguments.model_dir.resolve().name,
        "text": arguments.tokens.stem,
    }
    grid = {"group_size": arguments.group_size}
    grid |= {"desc_act": arguments.desc_act, "sym": arguments.sym}
    if ENGINES[arguments.engine][1] is keep:
        return [common | {"bits": 16} | grid | {"group_size": None, "draw": 0}]
    if arguments.engine == "qalora-refined":
        from qalora_plugin.quantize.refine import RefineSettings

        grid["refine_rate"] = arguments.refine_rate or RefineSettings.rate
        grid["refine_steps"] = arguments.refine_steps or RefineSettings.steps
        grid["refine_norms"] = arguments.refine_norms
    return [
        common | {"bits": bits} | grid | {"draw": draw}
        for draw in arguments.draws
        for bits in arguments.bits
    ]


def main() -> int:
    """Make the rows that are missing; return 3 if the time was up before the last."""
    parser = session.options(__doc__.splitlines()[0], RESULTS / "quantizers.jsonl")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--refine-rate", type=float, help="of qalora-refined, as the next two")
    parser.add_argument("--refine-steps", type=int)
    parser.add_argument("--refine-norms", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--sym", action="store_true")
    arguments = parser.parse_args()
    make = partial(measured, arguments.model_dir.resolve(), arguments.tokens.resolve())

    def next_run(rows: list[Row]) -> session.Make | None:
        for setting in settings(arguments):
            if not any(setting.items() <= row.items() for row in rows):
                return partial(make, setting)
        return None

    return session.work(arguments, next_run)


if __name__ == "__main__":
    sys.exit(main())
