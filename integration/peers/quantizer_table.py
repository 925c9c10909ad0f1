"""Put the rows of compare_quantizers.py into README and docs: mean and deviation over draws.

python integration/peers/quantizer_table.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

_RESULTS, _ROOT = Path(__file__).resolve().parent / "results", Path(__file__).resolve().parents[2]
TABLES = {
    _ROOT / "README.md": _RESULTS / "quantizers.json",
    _ROOT / "docs" / "export.md": _RESULTS / "offsets_at.json",
}
"""The rows that each document's table is made of."""
TEXTS = ("sources", "completions", "prompts", "pairs")
UNQUANTIZED = {"none": "", "softened": "logits divided by 1.1"}
START, END = "<!-- quantizers -->", "<!-- end quantizers -->"
NAMES = {
    "qalora": "qalora",
    "qalora-minimum": "qalora (minimum)",
    "gptqmodel": "GPTQModel",
}


def cell(rows: list[dict[str, Any]], figure: str) -> str:
    """`mean ± standard deviation` of one figure."""
    values = [row[figure] for row in rows]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4f} ± {spread:.4f}"


def line(text: str, rows: list[dict[str, Any]]) -> str:
    """The draws of one setting."""
    first = rows[0]
    act_order = "yes" if first["desc_act"] else "no"
    name = f"{NAMES[first['engine']]} {first['version']}"
    return (
        f"| {text} | {first['bits']} | {act_order} | {name} | {cell(rows, 'heldout_loss')} "
        f"| {cell(rows, 'heldout_kl')} | {len(rows)} |"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each text, bit width, act-order or not, and engine."""
    lines = [
        "| text | bits | act-order | quantizer | held-out loss | KL from 16 bits | draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for text in (text for text in TEXTS if any(row["text"] == text for row in rows)):
        here = [row for row in rows if row["text"] == text]
        for row in here:
            if row["bits"] == 16:
                figures = f"{row['heldout_loss']:.4f} | {row['heldout_kl']:.4f}"
                lines.append(f"| {text} | 16 | | {UNQUANTIZED[row['engine']]} | {figures} | |")
        settings = {(row["desc_act"], -row["bits"]) for row in here if row["bits"] != 16}
        for desc_act, negative_bits in sorted(settings):
            for engine in NAMES:
                key = (engine, desc_act, -negative_bits)
                same = [r for r in here if (r["engine"], r["desc_act"], r["bits"]) == key]
                if same:
                    lines.append(line(text, same))
    return "\n".join(lines)


def fill(text: str, rows: list[dict[str, Any]]) -> str:
    """`text` with the table between its two markers."""
    before, rest = text.split(START)
    return f"{before}{START}\n{table(rows)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    for document, rows in TABLES.items():
        document.write_text(fill(document.read_text(), json.loads(rows.read_text())))
