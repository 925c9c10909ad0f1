"""Fill the tuning cache (QALORA_TUNING_CACHE): fused or library, and which blocks, for each shape.

    python tune.py --device cuda --output tuning.jsonl --shapes 4096x4096 --bits 4 --compile-only
    python tune.py --device cuda --output tuning.jsonl --shapes 4096x4096,8192x8192 --bits 4

The first form only compiles the candidates, into Triton's cache: compiling takes a processor and
measuring must have the GPU to itself, so several of the first may run at once before the second.
The rows written say which plan was taken for each shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import linear
import operators
import record
import torch
from triton.runtime.errors import OutOfResources

from qalora_kernels import QuantSpec
from qalora_kernels.backends.triton import matmul, tuning

PRODUCTS = {"linear": matmul.linear, "grad_input": matmul.grad_input}


def candidates(name: str) -> list[tuning.Plan]:
    """Every distinct plan that is measured for an operator."""
    plans = tuning._shipped()["candidates"][name].values()
    return list(dict.fromkeys(tuning.Plan(**entry) for bucket in plans for entry in bucket))


def arguments_of(name: str, layer: operators.Layer, rows: int) -> tuple[Any, ...]:
    """What a product is called with on `rows` random rows."""
    spec = layer.spec
    width = spec.in_features if name == "linear" else spec.out_features
    x = torch.randn(rows, width, device=layer.dense.device, dtype=operators.DTYPE)
    bias = (None,) if name == "linear" else ()
    return x, layer.packed, *bias


def compile_candidates(layer: operators.Layer) -> Iterator[record.Row]:
    """Run every candidate once: a row each, with how long that took or why it does not fit."""
    chosen = tuning.plan
    for name, product in PRODUCTS.items():
        for plan in candidates(name):
            tuning.plan = lambda *_, plan=plan: plan
            row: record.Row = {"operator": f"compile {name}", "bits": layer.spec.bits}
            begin = time.perf_counter()
            try:
                product(*arguments_of(name, layer, plan.block_m))
            except OutOfResources as error:
                row["not_run"] = str(error)
            row |= {"plan": asdict(plan), "result": f"{time.perf_counter() - begin:.1f} s"}
            yield row
    tuning.plan = chosen


def tune(layer: operators.Layer) -> Iterator[record.Row]:
    """Let every bucket of M find its plan."""
    spec = layer.spec
    k, n = spec.in_features, spec.out_features
    base = {"K": k, "N": n, "bits": spec.bits, "group_size": spec.group_size}
    for name, product in PRODUCTS.items():
        for rows in tuning.BUCKETS:
            arguments = arguments_of(name, layer, rows)
            x = arguments[0]
            product(*arguments)
            shape = (name, x.dtype, spec.bits, spec.group_size, n, k)
            plan = tuning._plans.get((x.device, *shape, False, rows))
            row = base | {"operator": f"tune {name}", "M": rows}
            if plan is None:
                yield row | {"not_run": "no memory to measure in: the untuned default serves"}
                continue
            result = f"{plan.block_m}x{plan.block_out}x{plan.block_in}" if plan.fused else "library"
            yield row | {"plan": asdict(plan), "result": result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="data file, appended to")
    parser.add_argument("--shapes", type=linear.shapes, required=True, help="KxN,KxN,...")
    parser.add_argument("--bits", type=linear.numbers, default=[4])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    data = record.DataFile(arguments.output, record.measure.origin(arguments.device))
    with torch.no_grad():
        for k, n in arguments.shapes:
            for bits in arguments.bits:
                spec = QuantSpec(bits, arguments.group_size, k, n)
                layer = operators.Layer.random(spec, arguments.device)
                find = compile_candidates if arguments.compile_only else tune
                for row in find(layer):
                    data.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
