"""Sweep of the scales' start and learning rate: what the package's defaults come from.

    PYTHON recipes/study/sweep_scales.py [--seconds 200]

60 steps of the comparison's task, one seed, validation loss. `start` is the bound of the uniform
qalora_scale_A. `lora`, `peqa` and `zeros` are swept too, for the rates that suit them.
Appends to results/scales.jsonl and skips what is there. `report.py` makes the table.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import methods
import transformers
from compare_modes import add_row, read_rows
from task import Task, loss, train, windows
from torch import nn

ROWS = Path(__file__).resolve().parent / "results" / "scales.jsonl"
TASK = Task(steps=60, warmup=10)

STARTS = ("1/sqrt(K)", "1/sqrt(G)", "1")
Setting = tuple[str, int, str | None, float, float]
"""Method, bits, start, learning rate, ratio of the scales' rate to it."""

PLAN: list[Setting] = [
    *(("lora", 16, None, lr, 1) for lr in (0.003, 0.01, 0.03)),
    *(("peqa", 4, None, lr, 1) for lr in (0.01, 0.03, 0.1)),
    *(("zeros", 4, None, lr, 1) for lr in (0.003, 0.01, 0.03, 0.1)),
    *(("scales", 4, start, lr, 1) for lr in (0.01, 0.03, 0.1) for start in STARTS),
    *(("scales", 2, start, 0.03, 1) for start in STARTS),
    *(("scales", 2, start, 0.1, 1) for start in STARTS[:2]),
    *(("scales", bits, "1", lr, 1) for bits, lr in ((4, 0.06), (2, 0.01))),
    *(("both", 4, "1", 0.01, ratio) for ratio in (1, 3, 10)),
    *(("both", 4, "1/sqrt(K)", 0.01, ratio) for ratio in (3, 10)),
    *(("both", 4, "1", lr, ratio) for lr, ratio in ((0.02, 3), (0.005, 10))),
]


KEYS = ("method", "bits", "start", "lr", "scale_lr_ratio")


def set_start(model: nn.Module, start: str) -> None:
    """Rescale each qalora_scale_A to the bound `start`; made with bound 1 by the package."""
    for layer in methods.scale_layers(model):
        weight = layer.qalora_scale_A["default"].weight
        sizes = {"1/sqrt(K)": layer.in_features, "1/sqrt(G)": weight.shape[1], "1": 1}
        weight.data *= 1 / math.sqrt(sizes[start])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run later")
    parser.add_argument("--bases", type=Path, help="folder that keeps the quantized bases")
    arguments = parser.parse_args()
    transformers.logging.disable_progress_bar()
    begun, ids = time.monotonic(), windows(TASK)
    done = {tuple(row[key] for key in KEYS) for row in read_rows(ROWS)}
    with tempfile.TemporaryDirectory() as scratch:
        bases = arguments.bases or Path(scratch)
        for setting in [s for s in PLAN if s not in done]:
            if time.monotonic() - begun > arguments.seconds:
                print("more runs to make: start this command again")
                return 3
            method, bits, start, lr, ratio = setting
            settings = methods.Settings(scale_lr_ratio=ratio)
            if method == "lora":
                model = methods.lora(settings, seed=0)
            else:
                base = methods.quantized_base(bases, bits, settings.group_size, ids.calibration)
                model = methods.adapted(base, method, settings, seed=0)
            if start is not None:
                set_start(model, start)
            train(model, methods.groups(model, lr, settings), ids.train, TASK, seed=0)
            row = dict(zip(KEYS, setting, strict=True))
            add_row(ROWS, row | {"validation_loss": round(loss(model, ids.validation), 5)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
