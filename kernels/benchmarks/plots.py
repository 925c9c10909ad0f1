"""Draw the last run of a data file that `bench.py` wrote.

    python kernels/benchmarks/plots.py kernels/benchmarks/results/cpu.jsonl

writes cpu-training-step-*.png (time and peak memory of each training step) and cpu-linear.png
(time of the matrix product over the number of rows) beside it. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    sys.exit("plots.py needs matplotlib: pip install matplotlib")

Row = dict[str, Any]

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
    "dense": "dense bf16",
    "tinygemm": "int4 of torch (tinygemm)",
    "gemlite": "gemlite",
    "bitsandbytes_nf4": "NF4 (bitsandbytes)",
}


def last_run(path: Path) -> list[Row]:
    """Rows of the newest run.

    Raises:
        SystemExit: the file is empty.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not rows:
        sys.exit(f"{path}: no rows; run bench.py first")
    newest = max(row["run"] for row in rows)
    return [row for row in rows if row["run"] == newest]


def caption(row: Row) -> str:
    """Where the numbers come from."""
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}\n"
        f"commit {row['commit']}, {row['run'][:10]}; medians, and quartiles as whiskers or bands"
    )


def bars(axes: Any, rows: list[Row], values: list[float], unit: str) -> None:
    """Horizontal bars, one a variant, ours in colour."""
    names = [LABELS[row["variant"]] for row in rows]
    colours = ["skyblue" if row["variant"].startswith("qalora") else "lightgray" for row in rows]
    axes.barh(names, values, color=colours)
    for position, value in enumerate(values):
        axes.text(value / 50, position, f"{value:.0f}", va="center", fontsize=8)
    axes.set_xlabel(unit)


def plot_step(name: str, rows: list[Row], path: Path) -> None:
    """Time and peak memory of one training step."""
    rows = sorted(rows, key=lambda row: row["seconds_median"])
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 0.4 * len(rows) + 1.6), sharey=True, layout="constrained"
    )
    times = [row["seconds_median"] * 1e3 for row in rows]
    bars(left, rows, times, "ms")
    below = [(row["seconds_median"] - row["seconds_q1"]) * 1e3 for row in rows]
    above = [(row["seconds_q3"] - row["seconds_median"]) * 1e3 for row in rows]
    left.errorbar(times, range(len(rows)), xerr=(below, above), fmt="none", ecolor="black")
    left.invert_yaxis()  # shared: the fastest on top
    bars(right, rows, [row["peak_bytes"] / 2**20 for row in rows], "MiB at the peak")
    rank, tokens = rows[0]["step"]["r"], rows[0]["M"]
    figure.suptitle(f"{name}: forward and backward of {tokens} tokens, r = {rank}", fontsize=10)
    figure.supxlabel(caption(rows[0]), fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def plot_linear(rows: list[Row], path: Path) -> None:
    """Time of y = x W^T over the number of rows, one panel for each shape and width."""
    panels: dict[tuple[int, int, int], dict[str, list[Row]]] = defaultdict(dict)
    for row in rows:
        panel = panels[row["K"], row["N"], row["bits"]]
        panel.setdefault(row["variant"], []).append(row)
    shapes = sorted({(k, n) for k, n, _ in panels})
    widths = sorted({bits for _, _, bits in panels})
    size = (2.8 * len(widths) + 2.5, 2.8 * len(shapes) + 1.2)
    figure, grid = pyplot.subplots(
        len(shapes), len(widths), figsize=size, squeeze=False, sharey="row", layout="constrained"
    )
    for (k, n, bits), variants in panels.items():
        axes = grid[shapes.index((k, n))][widths.index(bits)]
        for variant, line in sorted(variants.items()):
            line = sorted(line, key=lambda row: row["M"])
            m = [row["M"] for row in line]
            style = {"linewidth": 2.2} if variant == "qalora" else {"linestyle": "--"}
            axes.plot(m, [row["seconds_median"] * 1e3 for row in line], label=variant, **style)
            low, high = ([row[f"seconds_{q}"] * 1e3 for row in line] for q in ("q1", "q3"))
            axes.fill_between(m, low, high, alpha=0.2)
        axes.set(xscale="log", yscale="log", title=f"{bits} bits, {k} x {n}", xlabel="rows M")
    grid[0][0].set_ylabel("ms")
    handles, names = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, [LABELS[name] for name in names], loc="outside upper center", ncols=2)
    figure.supxlabel(caption(rows[0]), fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    measured = [row for row in last_run(data) if "seconds_median" in row]
    linear = [row for row in measured if row["operator"] == "linear"]
    if linear:
        plot_linear(linear, data.with_name(f"{data.stem}-linear.png"))
    steps: dict[str, list[Row]] = defaultdict(list)
    for row in measured:
        if "peak_bytes" in row:
            steps[row["operator"]].append(row)
    for name, rows in steps.items():
        slug = re.sub(r"\W+", "-", name).strip("-")
        plot_step(name, rows, data.with_name(f"{data.stem}-{slug}.png"))
    print(f"drew {bool(linear) + len(steps)} plots beside {data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
