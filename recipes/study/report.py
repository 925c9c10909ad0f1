"""Write the tables of the study into README and docs from the data files, and draw the comparison.

    python recipes/study/report.py [--no-plot]

Each table stands between `<!-- NAME -->` and `<!-- end NAME -->` and is replaced as a whole, so no
number in it is typed by hand. The plot, results/modes.svg, needs matplotlib.
"""

import argparse
import statistics
import sys
from operator import itemgetter
from pathlib import Path

import compare_modes
import language_report
import plan
import quantizer_table
import sweep_scales
from rows import RESULTS, Row, markdown, read_rows, spread

ROOT = Path(__file__).resolve().parents[2]
PLOT = compare_modes.ROWS.with_name("modes.svg")
STEPS = ROOT / "kernels" / "benchmarks" / "results" / "cpu.jsonl"
STEP = "training step, 4 layers of 1024, 4 x 512"
VARIANTS = {"zeros": "qalora", "scales": "qalora_scales", "both": "qalora_both"}

NAMES = {
    "lora": "LoRA, 16 bits",
    "lora+gptq": "LoRA, merged, quantized again",
    "peqa": "PEQA",
    "zeros": "`zeros`",
    "scales": "`scales`",
    "both": "`both`",
}


def _losses(rows: list[Row]) -> str:
    return spread(rows, "test_loss", 3)


def comparison(rows: list[Row]) -> str:
    """Return the table of the test loss of every method and width over the seeds."""
    widths = (16, *plan.BITS)
    lines = [["not trained", "", "", *(_losses(plan.cell(rows, "base", b)[:1]) for b in widths)]]
    for method in plan.METHODS:
        finals = [plan.final_rows(rows, method, bits) for bits in widths]
        done = [row for found in finals for row in found]
        settings = [f"{done[0]['parameters']:,}", f"{done[0]['lr']:g}"] if done else ["", ""]
        lines.append([NAMES[method], *settings, *map(_losses, finals)])
    head = ["", "trained parameters", "learning rate", *(f"{bits} bits" for bits in widths)]
    return markdown(head, lines)


def sweep(rows: list[Row]) -> str:
    """Return the table of the validation loss over the scales' start, rate, and ratio."""
    lines = [
        [
            NAMES[row["method"]],
            f"{row['bits']}",
            row["start"] or "",
            f"{row['lr']:g}",
            f"{row['lr'] * row['scale_lr_ratio']:g}" if row["method"] == "both" else "",
            f"{row['validation_loss']:.3f}",
        ]
        for row in rows
    ]
    head = ["", "bits", "start", "learning rate", "of the scales", "validation loss"]
    return markdown(head, lines)


def step_costs(rows: list[Row]) -> str:
    """Return the table of a step's time and memory in each mode, from the benchmarks' last runs."""
    lines = []
    steps, run = [row for row in rows if row["operator"] == STEP], itemgetter("run")
    for adapt in plan.METHODS[-3:]:
        row = max((r for r in steps if r.get("variant") == VARIANTS[adapt]), key=run, default=None)
        if row is None:
            continue
        lora = next(r for r in steps if r.get("variant") == "lora" and run(r) == run(row))
        seconds = row["seconds_median"]
        allocated = row.get("allocated_peak_bytes")  # rows of earlier runs are without it
        lines.append(
            [
                NAMES[adapt],
                f"{seconds * 1e3:.0f}",
                f"{seconds / lora['seconds_median']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
                "" if allocated is None else f"{allocated / 2**20:.0f}",
                f"{row['saved_bytes'] / 2**20:.0f}",
            ]
        )
    if not lines:
        return "Not measured yet: `python kernels/benchmarks/bench.py --only steps`."
    memory = ["resident peak, MiB", "allocated peak, MiB", "kept for the backward, MiB"]
    head = ["", "ms a step (median)", "over LoRA's median, bf16", *memory]
    return markdown(head, lines)


def tables() -> dict[str, dict[str, str]]:
    """Return the tables of each document, by name."""
    quantizers = read_rows(RESULTS / "quantizers.jsonl")
    offsets_at = read_rows(RESULTS / "offsets_at.jsonl")
    smollm2 = read_rows(RESULTS / "quantizers_smollm2.jsonl")
    language = language_report.table(language_report.study_rows(), "gsm8k")
    return {
        "README.md": {"language": language},
        "docs/choosing.md": {"language": language},
        "docs/quantizers.md": {
            "summary": quantizer_table.summary(quantizers),
            "quantizers": quantizer_table.table(quantizers),
            "smollm2": quantizer_table.real_model(smollm2),
        },
        "docs/export.md": {"quantizers": quantizer_table.table(offsets_at)},
        "docs/adapt_modes.md": {
            "comparison": comparison(read_rows(compare_modes.ROWS)),
            "sweep": sweep(read_rows(sweep_scales.ROWS)),
            "steps": step_costs(read_rows(STEPS)),
        },
    }


def filled(document: str, parts: dict[str, str]) -> str:
    """Return the text of a document with the parts of these names replaced.

    Raises:
        SystemExit: the document has no place for one of them.
    """
    text = (ROOT / document).read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin not in text or end not in text:
            sys.exit(f"{document}: expected {begin} and {end} around a table, found no such place")
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Draw the test loss over the width, one line a method, with the spread as whiskers."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "0"  # the same data, the same bytes
        from matplotlib import pyplot
    except ImportError:
        sys.exit("report.py draws with matplotlib: pip install matplotlib, or --no-plot")
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in plan.METHODS[1:]:
        finals = {bits: plan.final_rows(rows, method, bits) for bits in plan.BITS}
        losses = {b: [row["test_loss"] for row in found] for b, found in finals.items() if found}
        means = [statistics.mean(values) for values in losses.values()]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in losses.values()]
        shifted = [bits + 0.03 * (plan.METHODS.index(method) - 3) for bits in losses]
        label = NAMES[method].strip("`")
        axes.errorbar(shifted, means, yerr=spreads, label=label, marker="o", capsize=3)
    lora = [row["test_loss"] for row in plan.final_rows(rows, "lora", 16)]
    axes.axhline(statistics.mean(lora), color="black", linestyle="--", label=NAMES["lora"])
    axes.set(xticks=plan.BITS, xlabel="bits", ylabel="test loss, nats a token")
    axes.invert_xaxis()
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    """Fill the documents and draw the plot; return 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args()
    for document, parts in tables().items():
        (ROOT / document).write_text(filled(document, parts))
    if not arguments.no_plot:
        plot(read_rows(compare_modes.ROWS), PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
