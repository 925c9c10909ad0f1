"""Sweep of the scales' start and learning rate: what the package's defaults come from.

    python recipes/study/sweep_scales.py [--seconds 200]

60 steps of the comparison's task, one seed, validation loss. `start` is the bound of the uniform
qalora_scale_A. `lora`, `peqa` and `zeros` are swept too, for the rates that suit them. The rows are
in results/scales.jsonl; report.py makes the table of them.
"""

import math
import sys
from functools import partial
from pathlib import Path

import methods
import session
from rows import RESULTS, Row
from task import Task, Windows, loss, train, windows
from torch import nn

from qalora_plugin import parameter_groups

ROWS = RESULTS / "scales.jsonl"
TASK = Task(steps=60, warmup=10)

STARTS = ("1/sqrt(K)", "1/sqrt(G)", "1")
KEYS = ("method", "bits", "start", "lr", "scale_lr_ratio")
Setting = tuple[str, int, str | None, float, float]
"""Values of KEYS; `scale_lr_ratio` is the scales' learning rate over `lr`."""

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


def set_start(model: nn.Module, start: str) -> None:
    """Rescale each qalora_scale_A to the bound `start`; made with bound 1 by the package."""
    for layer in methods.scale_layers(model):
        weight = layer.qalora_scale_A["default"].weight
        sizes = {"1/sqrt(K)": layer.in_features, "1/sqrt(G)": weight.shape[1], "1": 1}
        weight.data *= 1 / math.sqrt(sizes[start])


def trained(setting: Setting, ids: Windows, bases: Path) -> list[Row]:
    """Make one training and return its row."""
    method, bits, start, lr, ratio = setting
    models = methods.Models(methods.Settings(), bases, ids.calibration)
    model = models.build(method, bits, seed=0)
    if start is not None:
        set_start(model, start)
    train(model, parameter_groups(model, lr, scale_lr_ratio=ratio), ids.train, TASK, seed=0)
    row = dict(zip(KEYS, setting, strict=True))
    return [row | {"validation_loss": round(loss(model, ids.validation), 5)}]


def main() -> int:
    """Make the runs that are missing; return 3 if the time was up before the last."""
    arguments = session.options(__doc__.splitlines()[0], ROWS).parse_args()
    ids = windows(TASK)

    def next_run(rows: list[Row]) -> session.Make | None:
        done = {tuple(row[key] for key in KEYS) for row in rows}
        return next((partial(trained, s, ids) for s in PLAN if s not in done), None)

    return session.work(arguments, next_run)


if __name__ == "__main__":
    sys.exit(main())
