"""Print the rows of the study of a language model as tables.

    python recipes/study/language_report.py [--rows FILE]

report.py writes them into README and docs.

One table a task: the test loss of answers in nats a token, and for commonsense the macro accuracy,
as mean and standard deviation over the seeds at each method's best rate.
"""

import argparse
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
    """Return the table of one task: a line a method and a column a setting that have rows."""
    methods = ("base", *METHODS)
    cells = {
        (method, setting): finals(rows, task, method, setting)
        for method in methods
        for setting in ((16, None), *study.SETTINGS)
    }
    settings = dict.fromkeys(setting for (_, setting), found in cells.items() if found)
    lines = []
    for method in methods:
        done = [row for setting in settings for row in cells[method, setting]]
        if done:
            facts = ["", ""]
            if method != "base":
                facts = [f"{done[0]['parameters']:,}", f"{done[0]['lr']:g}"]
            figures = (_figures(cells[method, setting]) for setting in settings)
            lines.append([NAMES[method], *facts, *figures])
    widths = ("16 bits" if g is None else f"{b} bits, g={g}" for b, g in settings)
    return markdown(["", "trained parameters", "rate", *widths], lines)


def _figures(rows: list[Row]) -> str:
    text = spread(rows, "test_loss", 3)
    accuracies = [{"macro": row["accuracy"]["macro"]} for row in rows if "accuracy" in row]
    if accuracies:
        text += f"; {spread(accuracies, 'macro', 3)}"
    return text


def study_rows(path: Path = study.ROWS) -> list[Row]:
    """Return the rows of the study itself, without those of its slice."""
    return study.of_sizes(read_rows(path), study.tasks.Sizes())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=study.ROWS)
    rows = study_rows(parser.parse_args().rows)
    for task in study.TASKS:
        print(f"{task}\n\n{table(rows, task)}\n")


if __name__ == "__main__":
    main()
