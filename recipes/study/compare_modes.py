"""Held-out loss after fine-tuning: 16-bit LoRA, LoRA re-quantized, PEQA, zeros, scales, both.

    python recipes/study/compare_modes.py [--only METHOD ...] [--seconds 200]

The embedded base is fine-tuned on text of shared/data. Every method gets the same tokens, rank and
optimizer and the same sweep of learning rates at 4 bits: three, and further ones while the best
lies at the end. The validation loss chooses, the test loss is reported, over three seeds. The rows
are in results/modes.jsonl; report.py makes the table and the plot of them.
"""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import methods
import plan
import session
from rows import RESULTS, Row
from task import Task, Windows, loss, train, windows
from torch import nn

from qalora_plugin import parameter_groups

ROWS = RESULTS / "modes.jsonl"


def losses(model: nn.Module, ids: Windows) -> dict[str, float]:
    """Return the losses of a model, in nats a token."""
    splits = {"validation": ids.validation, "test": ids.test}
    return {f"{name}_loss": round(loss(model, part), 5) for name, part in splits.items()}


def trained(todo: plan.Run, task: Task, ids: Windows, bases: Path) -> list[Row]:
    """Make one training and return its rows; a LoRA's has one for each width."""
    method, bits, lr, seed = todo
    models = methods.Models(methods.Settings(), bases, ids.calibration)
    model = models.build(method, bits, seed)
    groups = parameter_groups(model, lr, scale_lr_ratio=models.settings.scale_lr_ratio)
    parameters = sum(p.numel() for group in groups for p in group["params"])
    seconds = train(model, groups, ids.train, task, seed)
    common = {"lr": lr, "seed": seed, "parameters": parameters, "step_seconds": round(seconds, 3)}
    common |= asdict(models.settings) | asdict(task)
    if method not in methods.LORAS:
        return [{"method": method, "bits": bits} | losses(model, ids) | common]
    merged = model.merge_and_unload()
    rows = [{"method": "lora", "bits": 16} | losses(merged, ids) | common]
    for width in plan.BITS:
        again = models.requantized(merged, width)
        rows.append({"method": "lora+gptq", "bits": width} | losses(again, ids) | common)
    return rows


def untrained(bits: int, ids: Windows, bases: Path) -> list[Row]:
    """Return the row of a base that was not trained."""
    model = methods.Models(methods.Settings(), bases, ids.calibration).base(bits)
    return [{"method": "base", "bits": bits} | losses(model, ids)]


def main() -> int:
    """Make the runs that are missing; return 3 if the time was up before the last."""
    parser = session.options(__doc__.splitlines()[0], ROWS)
    parser.add_argument(
        "--only", nargs="+", choices=plan.METHODS, default=plan.METHODS, metavar="METHOD"
    )
    arguments = parser.parse_args()
    task = Task()
    ids = windows(task)

    def next_run(rows: list[Row]) -> session.Make | None:
        for method, bits in plan.cells(arguments.only):
            if not plan.cell(rows, "base", bits):
                return partial(untrained, bits, ids)
            if todo := plan.missing(rows, method, bits):
                return partial(trained, todo[0], task, ids)
        return None

    return session.work(arguments, next_run)


if __name__ == "__main__":
    sys.exit(main())
