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

import operators
import record
import steps
import torch

HERE = Path(__file__).resolve().parent
STEP_VARIANTS = [
    "qalora",
    "qalora_scales",
    "qalora_both",
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

TOKENS = 2048
LLAMA_1024 = {
    "hidden": 1024,
    "intermediate": 2816,
    "layers": 4,
    "heads": 16,
    "vocab": 4096,  # a small head: it costs the same in every variant
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
    parser.add_argument(
        "--sequence", type=int, default=512, help="tokens of a sequence in the small model's step"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def main() -> int:
    arguments = parse()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    output = arguments.output or HERE / "results" / f"{device}.jsonl"
    data, limits = record.open_data_file(output, device)
    print(json.dumps(data.origin, indent=1))
    if arguments.only != "steps":
        for shape in SHAPES[:1] if arguments.quick else SHAPES:
            for bits in (4,) if arguments.quick else (2, 3, 4, 8):
                rows = [1, 16, 512] if arguments.quick else ROWS[device]
                common = (arguments.group_size, rows, arguments.rank, arguments.rounds)
                for row in operators.run(shape, bits, *common, device, limits):
                    data.add(row)
    if arguments.only != "operators":
        settings = {
            "device": device,
            "threads": arguments.threads,
            "bits": 4,
            "group_size": arguments.group_size,
            "r": arguments.rank,
        }
        length = arguments.sequence
        batch = TOKENS // length
        name = f"training step, 4 layers of 1024, {batch} x {length}"
        wanted = {name: LLAMA_1024 | {"batch": batch, "sequence": length}}
        if device == "cuda":
            wanted["training step, 1 layer of LLaMA-7B"] = LLAMA_7B_LAYER
        for name, shapes in wanted.items():
            for row in steps.run(name, settings | shapes, STEP_VARIANTS, arguments.rounds):
                data.add(row)
    print(f"appended to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
