"""Measure every operator and whole training steps beside their peers; append to a data file.

    python kernels/benchmarks/bench.py --device cpu --quick
    python kernels/benchmarks/bench.py --device cuda

Compared variants take turns in every round, so that what else the machine does hits all of them;
ratios are taken round by round. Each line of the data file is one JSON object: a variant's time
("seconds_*": median, quartiles, extremes), a ratio ("ratio_*"), or a peer that could not run
("not_run", the reason). `plots.py` draws it. Peers of the steps run in the environments that
`integration/envs/build.py gptqmodel` and `... axolotl` make; they are not built here.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import measure
import operators
import steps
import torch

HERE = Path(__file__).resolve().parent
STEP_VARIANTS = [
    "qalora",
    "lora",
    "lora_fp32",
    "frozen",
    "use_qalora",
    "use_qalora_fp32",
    "qlora_nf4",
]

# K, N: the two shapes of a LLaMA-7B layer's products that differ most in size
SHAPES = [(4096, 4096), (4096, 11008)]
ROWS = {
    "cpu": [1, 4, 16, 64, 512, 2048],
    "cuda": [1, 4, 16, 64, 256, 2048, 8192],
}

LLAMA_1024 = {
    "hidden": 1024,
    "intermediate": 2816,
    "layers": 4,
    "heads": 16,
    "vocab": 4096,  # a small head: it costs the same in every variant
    "batch": 4,
    "sequence": 512,
}
LLAMA_7B_LAYER = {
    "hidden": 4096,
    "intermediate": 11008,
    "layers": 1,
    "heads": 32,
    "vocab": 4096,
    "batch": 4,
    "sequence": 2048,
}


def describe(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    shape = " ".join(f"{key}={row[key]}" for key in ("K", "N", "M", "bits") if key in row)
    head = f"{row['operator']:<32} {row.get('variant') or row.get('ratio'):<24} {shape:<32}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    if "ratio" in row:
        return f"{head} {row['ratio_median']:.3f}  ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
    middle, low, high = (row[f"seconds_{name}"] * 1e3 for name in ("median", "q1", "q3"))
    text = f"{head} {middle:9.3f} ms ({low:.3f} to {high:.3f})"
    if "peak_bytes" in row:
        mib = {k: row[f"{k}_bytes"] / 2**20 for k in ("peak", "weight", "saved")}
        text += "  MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in mib.items())
    if "copy_fraction" in row:
        text += f"  copy {row['copy_fraction']:.2f}  gemm {row['gemm_fraction']:.2f}"
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="4 bits, one shape, fewer rows")
    parser.add_argument("--output", type=Path, help="data file, appended to; results/DEVICE.jsonl")
    parser.add_argument("--only", choices=["operators", "steps"])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--adapt", choices=["zeros", "scales", "both"], default="zeros")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def main() -> int:
    arguments = parse()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    output = arguments.output or HERE / "results" / f"{device}.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    limits = measure.limits(device)
    origin = measure.origin(device) | limits
    print(json.dumps(origin, indent=1))

    def keep(row: dict[str, Any]) -> None:
        print(describe(row), flush=True)
        with output.open("a") as file:
            file.write(json.dumps(origin | row) + "\n")

    if arguments.only != "steps":
        for shape in SHAPES[:1] if arguments.quick else SHAPES:
            for bits in (4,) if arguments.quick else (2, 3, 4, 8):
                rows = [1, 16, 512] if arguments.quick else ROWS[device]
                common = (arguments.group_size, rows, arguments.rank, arguments.rounds)
                for row in operators.run(shape, bits, *common, device, limits):
                    keep(row)
    if arguments.only != "operators":
        settings = {
            "device": device,
            "threads": arguments.threads,
            "bits": 4,
            "group_size": arguments.group_size,
            "r": arguments.rank,
            "adapt": arguments.adapt,
        }
        wanted = {"training step, 4 layers of 1024": LLAMA_1024}
        if device == "cuda":
            wanted["training step, 1 layer of LLaMA-7B"] = LLAMA_7B_LAYER
        for name, shapes in wanted.items():
            for row in steps.run(name, settings | shapes, STEP_VARIANTS, arguments.rounds):
                keep(row)
    print(f"appended to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
