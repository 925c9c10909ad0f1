"""Print the rows of the study of a language model as tables.

    python recipes/study/language_report.py [--rows FILE]

One table a task: the test loss of answers in nats a token, and for commonsense the macro accuracy,
as mean and standard deviation over the seeds at each method's best rate.
"""

import argparse
import statistics
from pathlib import Path

import language_study as study
from language_methods import METHODS
from rows import Row, markdown, read_rows, spread

NAMES = {
    "base": "not trained",
    "lora": "LoRA, 16 bits",
    "lora+gptq": "LoRA, merged, quantized",
    "qlora+gptq": "LoRA on the quantized base, merged, quantized",
    "peqa": "PEQA",
    "use_qalora": "PEFT's `use_qalora`",
    "zeros": "`zeros`",
    "scales": "`scales`",
    "both": "`both`",
    "both refined": "`both` on a refined base",
    "both auto": "`both` with bits auto",
}


def finals(rows: list[Row], task: str, method: str, setting: study.Setting) -> list[Row]:
    """Return one row a seed at the method's best rate; none before the first run."""
    if method != "base" and (method == "lora") != (setting[0] == 16):
        return []
    keys = {"task": task} | study.place(method, setting)
    found = [row for row in rows if keys.items() <= row.items()]
    if method == "base":
        return found
    best = study.best_rate(rows, task, method)
    return [row for row in found if row["lr"] == best]


def table(rows: list[Row], task: str) -> str:
    """Return the table of one task."""
    settings = ((16, None), *study.SETTINGS)
    lines = []
    for method in ("base", *METHODS):
        cells = [finals(rows, task, method, setting) for setting in settings]
        done = [row for cell in cells for row in cell]
        if not done:
            continue
        trained = method != "base"
        facts = ["", "", ""]
        if trained:
            seconds = statistics.median(row["step_seconds"] for row in done)
            facts = [f"{done[0]['parameters']:,}", f"{done[0]['lr']:g}", f"{seconds:.1f}"]
        lines.append([NAMES[method], *facts, *(_figures(cell) for cell in cells)])
    widths = ("16 bits" if g is None else f"{b} bits, g={g}" for b, g in settings)
    return markdown(["", "trained parameters", "rate", "seconds a step", *widths], lines)


def _figures(rows: list[Row]) -> str:
    text = spread(rows, "test_loss", 3)
    accuracies = [{"macro": row["accuracy"]["macro"]} for row in rows if "accuracy" in row]
    if accuracies:
        text += f"; {spread(accuracies, 'macro', 3)}"
    return text


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=study.ROWS)
    rows = study.of_sizes(read_rows(parser.parse_args().rows), study.tasks.Sizes())
    for task in study.TASKS:
        print(f"{task}\n\n{table(rows, task)}\n")


if __name__ == "__main__":
    main()
