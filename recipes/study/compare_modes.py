"""Held-out loss after fine-tuning: 16-bit LoRA, LoRA re-quantized, PEQA, zeros, scales, both.

    PYTHON recipes/study/compare_modes.py [--only METHOD ...] [--seconds 200]

The embedded base is fine-tuned on text of shared/data. Every method gets the same tokens, rank and
optimizer and the same sweep of learning rates at 4 bits: three, and further ones while the best
lies at the end. The validation loss chooses, the test loss is reported, over three seeds. Each run
is appended to results/modes.jsonl and is not made again, so the command may be stopped at any time
and started again. `report.py` makes the table and the plot of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import methods
import plan
import transformers
from task import Task, Windows, loss, train, windows
from torch import nn

ROWS = Path(__file__).resolve().parent / "results" / "modes.jsonl"


def read_rows(path: Path) -> list[plan.Row]:
    """All rows of a data file; none where it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_row(path: Path, row: plan.Row) -> None:
    """Append a row to a data file, and print it."""
    print(json.dumps(row), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def losses(model: nn.Module, ids: Windows) -> dict[str, float]:
    """Losses of a model, in nats a token."""
    splits = {"validation": ids.validation, "test": ids.test}
    return {f"{name}_loss": round(loss(model, part), 5) for name, part in splits.items()}


def run(
    todo: plan.Run, settings: methods.Settings, task: Task, ids: Windows, bases: Path
) -> list[plan.Row]:
    """Make one training; its rows, of which a LoRA's has one for each width."""
    method, bits, lr, seed = todo
    is_lora = method in ("lora", "lora+gptq")
    if is_lora:
        model = methods.lora(settings, seed)
    else:
        base = methods.quantized_base(bases, bits, settings.group_size, ids.calibration)
        model = methods.adapted(base, method, settings, seed)
    groups = methods.groups(model, lr, settings)
    parameters = sum(p.numel() for group in groups for p in group["params"])
    step = train(model, groups, ids.train, task, seed)
    common = {
        "lr": lr,
        "seed": seed,
        "parameters": parameters,
        "step_seconds": round(step, 3),
        **dataclasses.asdict(settings),
        **dataclasses.asdict(task),
    }
    if not is_lora:
        return [{"method": method, "bits": bits} | losses(model, ids) | common]
    merged = model.merge_and_unload()
    rows = [{"method": "lora", "bits": 16} | losses(merged, ids) | common]
    for width in plan.BITS:
        again = methods.requantized(merged, width, settings.group_size, ids.calibration)
        rows.append({"method": "lora+gptq", "bits": width} | losses(again, ids) | common)
    return rows


def untrained(bits: int, settings: methods.Settings, ids: Windows, bases: Path) -> plan.Row:
    """The row of a base as it is."""
    model = methods.sixteen_bit_model()
    if bits < 16:
        base = methods.quantized_base(bases, bits, settings.group_size, ids.calibration)
        model = methods.load(base)
    return {"method": "base", "bits": bits} | losses(model, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=plan.METHODS, default=plan.METHODS, metavar="METHOD"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run later")
    parser.add_argument("--bases", type=Path, help="folder that keeps the quantized bases")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the data file")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    task, settings, begun = Task(), methods.Settings(), time.monotonic()
    ids = windows(task)
    with tempfile.TemporaryDirectory() as scratch:
        bases = arguments.bases or Path(scratch)
        for method, bits in plan.cells(arguments.only):
            rows = read_rows(arguments.rows)
            if not plan.cell(rows, "base", bits):
                add_row(arguments.rows, untrained(bits, settings, ids, bases))
            while todo := plan.missing(read_rows(arguments.rows), method, bits):
                if time.monotonic() - begun > arguments.seconds:
                    print("more runs to make: start this command again")
                    return 3
                for row in run(todo[0], settings, task, ids, bases):
                    add_row(arguments.rows, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
