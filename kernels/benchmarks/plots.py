"""Draw time and peak memory of each training step's newest run; needs matplotlib.

    python kernels/benchmarks/plots.py kernels/benchmarks/results/cpu.jsonl

writes cpu-training-step-*.png beside the data file.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import measure
from measure import Row

LABELS = {
    "qalora": "QA-LoRA, 4 bits (this project)",
    "qalora_scales": "QA-LoRA of the scales",
    "qalora_both": "QA-LoRA of scales and offsets",
    "lora": "LoRA, dense bf16 (PEFT)",
    "lora_fp32": "LoRA, fp32 adapters (PEFT's default)",
    "frozen": "dense bf16, no adapter",
    "use_qalora": "use_qalora on GPTQModel (PEFT)",
    "use_qalora_fp32": "use_qalora, fp32 adapters (PEFT's default)",
    "qlora_nf4": "QLoRA NF4 (bitsandbytes)",
}


def newest_runs(path: Path) -> list[list[Row]]:
    """Return the rows of each training step's newest run, the fastest first."""
    runs: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in measure.read(path):
        if {"step", "seconds_median"} <= row.keys():
            runs[row["operator"]][row["run"]].append(row)
    newest = [of_step[max(of_step)] for of_step in runs.values()]
    return [sorted(rows, key=lambda row: row["seconds_median"]) for rows in newest]


def draw(rows: list[Row], path: Path) -> None:
    """Draw a bar a variant, ours in colour, with quartiles as whiskers."""
    from matplotlib import figure as figures

    figure = figures.Figure((11, 0.4 * len(rows) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels = [LABELS[row["variant"]] for row in rows]
    colours = ["skyblue" if row["variant"].startswith("qalora") else "lightgray" for row in rows]
    times = [row["seconds_median"] * 1e3 for row in rows]
    below = [(row["seconds_median"] - row["seconds_q1"]) * 1e3 for row in rows]
    above = [(row["seconds_q3"] - row["seconds_median"]) * 1e3 for row in rows]
    peaks = [row["peak_bytes"] / 2**20 for row in rows]
    for axes, values, unit in ((left, times, "ms"), (right, peaks, "MiB at the peak")):
        axes.barh(labels, values, color=colours)
        axes.set_xlabel(unit)
        for position, value in enumerate(values):
            axes.text(value / 50, position, f"{value:.0f}", va="center", fontsize=8)
    left.errorbar(times, range(len(rows)), xerr=(below, above), fmt="none", ecolor="black")
    left.invert_yaxis()  # shared: the fastest on top
    row = rows[0]
    what = f"forward and backward of {row['M']} tokens, r = {row['step']['r']}"
    figure.suptitle(f"{row['operator']}: {what}", fontsize=10)
    machine = f"{row['device']}, {row['threads']} threads, torch {row['torch']}"
    origin = f"commit {row['commit']}, {row['run'][:10]}; medians, and quartiles as whiskers"
    figure.supxlabel(f"{machine}\n{origin}", fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    data = Path(sys.argv[1])
    for rows in newest_runs(data):
        slug = re.sub(r"\W+", "-", rows[0]["operator"]).strip("-")
        draw(rows, data.with_name(f"{data.stem}-{slug}.png"))
