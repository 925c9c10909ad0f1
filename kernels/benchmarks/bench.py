"""Measure operators and training beside their peers; append the rows to a data file.

    python kernels/benchmarks/bench.py --device cpu --quick
    python kernels/benchmarks/bench.py --device cuda --only layer --rows 4096

Each line of the data file is one JSON object: a variant's time ("seconds_*": median, quartiles,
extremes), a ratio ("ratio_*"), or a variant that could not run ("not_run", the reason). Peers run
in environments that `integration/envs/build.py` makes; they are not built here.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import measure
import operators
import torch
import training
import worker

from qalora_kernels import QuantSpec

HERE = Path(__file__).resolve().parent
MODELS: dict[str, worker.Spec] = {
    # a small head: it costs the same in every variant
    "1024": {"hidden": 1024, "intermediate": 2816, "layers": 4, "heads": 16, "vocab": 4096},
    "7B-layer": {"hidden": 4096, "intermediate": 11008, "layers": 1, "heads": 32, "vocab": 128},
    "1.1B": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "vocab": 32000}
    | {"kv_heads": 8},
    "tiny": {"hidden": 64, "intermediate": 96, "layers": 1, "heads": 4, "vocab": 4096},
}
TOKENS = 2048  # of a step
# what of training is measured -> its model, variants and tokens of a sequence, unless told
TRAINING: dict[str, tuple[str, list[str], int]] = {
    "steps": ("1024", list(worker.VARIANTS), 512),
    "layer": ("7B-layer", ["qalora", "frozen", "lora", "qlora_nf4"], 2048),
    "sft": ("1.1B", ["qalora", "lora", "qlora_nf4"], 2048),
}
# K x N: the two shapes of a LLaMA-7B layer's products that differ most in size
SHAPES = ["4096x4096", "4096x11008"]
ROWS = [1, 4, 16, 64, 512, 2048]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="4 bits, one shape, fewer rows")
    parser.add_argument("--output", type=Path, help="data file, appended to; results/DEVICE.jsonl")
    parser.add_argument("--only", choices=["operators", "linear", *TRAINING])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each comparison")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", help="training takes the first, or 4")
    parser.add_argument("--shapes", nargs="+", metavar="KxN", help="of operators")
    parser.add_argument("--rows", type=int, nargs="+", help="M of operators, or of a layer")
    parser.add_argument("--peers", nargs="*", choices=operators.PEERS, default=["tinygemm"])
    parser.add_argument("--model", choices=MODELS, help="of training")
    parser.add_argument("--variants", nargs="+", choices=worker.VARIANTS, help="of training")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step of SFTTrainer")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return arguments


def of_operators(
    a: argparse.Namespace, limits: dict[str, float], only_linear: bool
) -> Iterator[measure.Row]:
    """Measure every operator, or the product alone, on each shape and width."""
    settings = operators.Settings(a.device, limits, a.rounds, a.rank, a.peers, only_linear)
    shapes = a.shapes or (SHAPES[:1] if a.quick else SHAPES)
    rows = a.rows or ([1, 16, 512] if a.quick else ROWS)
    for shape, bits in itertools.product(shapes, a.bits or ([4] if a.quick else [2, 3, 4, 8])):
        k, n = map(int, shape.split("x"))
        yield from operators.run(QuantSpec(bits, a.group_size, k, n), rows, settings)


def of_training(a: argparse.Namespace, what: str) -> Iterator[measure.Row]:
    """Measure steps, a decoder layer, or SFTTrainer."""
    model, variants, sequence = TRAINING[what]
    model, variants, sequence = a.model or model, a.variants or variants, a.sequence or sequence
    spec: worker.Spec = {"device": a.device, "threads": a.threads, "bits": (a.bits or [4])[0]}
    spec |= {"group_size": a.group_size, "r": a.rank, **MODELS[model], "sequence": sequence}
    if what == "steps":
        spec["batch"] = TOKENS // sequence
        name = f"training step, {spec['layers']} layers of {model}, {spec['batch']} x {sequence}"
        yield from training.steps(name, spec, variants, a.rounds)
    elif what == "layer":
        for rows in a.rows or [4096]:
            yield from training.layer(spec | {"batch": rows // sequence}, variants, a.rounds)
    else:
        yield from training.sft(model, spec | {"batch": a.batch}, variants, a.rounds)


def main() -> None:
    a = parse()
    torch.set_num_threads(a.threads)
    limits = measure.limits(a.device)
    output = a.output or HERE / "results" / f"{a.device}.jsonl"
    data = measure.DataFile(output, a.device, limits)
    for what in [a.only] if a.only else ["operators", "steps"]:
        of_what = (
            of_training(a, what) if what in TRAINING else of_operators(a, limits, what == "linear")
        )
        for row in of_what:
            data.add(row)
    print(f"appended to {output}")


if __name__ == "__main__":
    main()
