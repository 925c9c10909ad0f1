"""The matrix product alone, from one row (generation) to many, beside its peers.

    python linear.py --device cuda --output linear.jsonl --shapes 4096x4096 --bits 4 --rows 1,16

Each sample replays one CUDA graph that calls every one of the rotated layers once: kernel time, no
launch gaps, weights from memory. Variants take turns in every round. Forward only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import measure
import operators
import record
import torch

from qalora_kernels import QuantSpec, quantized_linear

OURS_AND_DENSE = ["qalora", "dense"]


def _functions(
    variants: list[str], layers: list[operators.Layer], x: torch.Tensor
) -> Iterator[tuple[str, Callable[[], Any] | None, str | None]]:
    """(variant, its function or None, why there is none)."""
    ours = {
        "qalora": lambda layer: quantized_linear(x, layer.packed, None),
        "dense": lambda layer: torch.nn.functional.linear(x, layer.dense),
    }
    for name in variants:
        if name in ours:
            yield name, operators.Rotation(ours[name], layers), None
        else:
            yield name, *operators.peer(name, layers, x)


def run(
    spec: QuantSpec,
    rows: list[int],
    variants: list[str],
    rounds: int,
    device: str,
    limits: dict[str, float],
) -> Iterator[record.Row]:
    """Measure one layer for each number of rows.

    Yields:
        One row a variant, a ratio "qalora / variant" for each, and the reason of each that cannot
        run.
    """
    layers = operators.rotated_layers(spec, device)
    k, n = spec.in_features, spec.out_features
    for m in rows:
        x = torch.randn(m, k, device=device, dtype=operators.DTYPE)
        shape = {"K": k, "N": n, "M": m, "bits": spec.bits, "group_size": spec.group_size}
        base = {"operator": "linear", "timing": "graph"} | shape
        graphs = {}
        for name, function, reason in _functions(variants, layers, x):
            if function is not None:
                try:
                    graphs[name] = measure.graphed(function, len(layers), device)
                except Exception as error:  # a peer that cannot be captured is a result
                    if name in OURS_AND_DENSE:
                        raise
                    reason = measure.first_line(error)
            if reason is not None:
                yield base | {"variant": name, "not_run": reason}
        samples = measure.interleave(graphs, rounds, device)
        samples = {v: [s / len(layers) for s in times] for v, times in samples.items()}
        moved = (m * k + m * n) * operators.DTYPE.itemsize
        work = operators.Work({}, moved, 2 * m * n * k)
        for name, times in samples.items():
            measured = measure.spread(times, "seconds")
            measured |= operators.fractions(name, work, layers[0], median(times), limits)
            measured |= {"rounds": rounds, "rotated": len(layers)}
            yield base | {"variant": name, "dtype": "bfloat16"} | measured
        for name in samples:
            if name != "qalora" and "qalora" in samples:
                numbers = measure.ratio(samples["qalora"], samples[name])
                yield base | {"ratio": f"qalora / {name}"} | numbers


def numbers(text: str) -> list[int]:
    """ "1,2,4" -> [1, 2, 4]."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    """ "KxN,KxN" -> [(K, N), ...]."""
    pairs = (part.split("x") for part in text.split(","))
    return [(int(k), int(n)) for k, n in pairs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="data file, appended to")
    parser.add_argument("--shapes", type=shapes, required=True, help="KxN,KxN,...")
    parser.add_argument("--bits", type=numbers, default=[4])
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--peers", default="", help="of " + ", ".join(operators.PEERS))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rotation", type=int, help="bytes of weights that take turns")
    arguments = parser.parse_args()
    if arguments.rotation is not None:
        operators.ROTATION[arguments.device] = arguments.rotation
    data, limits = record.open_data_file(arguments.output, arguments.device)
    variants = [*OURS_AND_DENSE, *filter(None, arguments.peers.split(","))]
    with torch.no_grad():
        for k, n in arguments.shapes:
            for bits in arguments.bits:
                spec = QuantSpec(bits, arguments.group_size, k, n)
                common = (arguments.rows, variants, arguments.rounds, arguments.device, limits)
                for row in run(spec, *common):
                    data.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
