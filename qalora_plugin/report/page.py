"""The figures of a run as one HTML page that needs nothing else.

All text that comes from files is escaped.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import QALoRAError
from ..files.atomic import replace_text
from ..files.json import json_text
from . import charts
from .figures import FIGURES_FILE, collect, peak_memory

_log = logging.getLogger(__name__)
PAGE_FILE = "report.html"
_KINDS = {
    "offset_change": ("Learned change of offsets", "in steps between two integers, rms"),
    "scale_change": ("Learned change of scales", "relative, rms"),
}
_STYLE = """
:root { color-scheme: light dark; --text: #1d2430; --dim: #b8bfca; --back: #fff; --card: #f4f6f9;
  --first: #2563eb; --second: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ef; --dim: #566070; --back: #12161d;
  --card: #1b212b; --first: #7aa7ff; --second: #ffa06b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem;
  background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
section { background: var(--card); border-radius: .5rem; padding: .25rem 1rem 1rem;
  margin: 1rem 0; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .7rem .2rem 0; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2rem 0; font-size: .85rem; }
dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0 0 0 1rem; }
.map td { padding: 0; min-width: 1.1rem; height: 1.1rem; border: 1px solid var(--card); }
.map th { font-weight: normal; padding: 0 .5rem 0 0; font-size: .8rem; white-space: nowrap; }
.ramp { display: inline-block; width: 6rem; height: .8em; vertical-align: middle;
  border: 1px solid var(--dim); background: linear-gradient(to right, var(--back), var(--first)); }
.scale { white-space: nowrap; }
svg { width: 100%; max-width: 36rem; height: auto; }
svg .guide.line { stroke: var(--dim) !important; }
.note { color: color-mix(in srgb, var(--text) 70%, transparent); font-size: .9rem; }
"""


def write_report(
    run: str | Path, *, merged: Path | None = None, verify: bool = False, **given: Any
) -> Path:
    """Write `report.html` and `report.json` into the directory of a run, and return the page.

    An earlier report of the same run is replaced. See `figures.collect` for arguments and errors.
    """
    run = Path(run).expanduser()
    figures = collect(run, merged=merged, verify=verify, **given)
    replace_text(run / FIGURES_FILE, json_text(figures, sort_keys=False))
    page = run / PAGE_FILE
    replace_text(page, as_html(figures, run.resolve().name))
    return page


def try_report(run: str | Path, **given: Any) -> None:
    """Write the report when a training ends; one that cannot be written is no reason to fail."""
    try:
        page = write_report(run, memory=peak_memory(), **given)
    except (QALoRAError, OSError) as error:
        _log.warning("qalora: no report was written: %s", error)
    else:
        _log.info("qalora: report: %s", page)


def as_html(figures: Mapping[str, Any], title: str) -> str:
    """Return the page of the figures that `collect` returns."""
    sections = [
        ("Result", _rows(figures.get("rows", []))),
        ("Loss", _losses(figures.get("history", []))),
        ("Answers to held-out prompts", _samples(figures.get("samples", []))),
        ("Is the merge exact?", _proof(figures.get("proof"))),
        *((_KINDS[kind][0], _heat_map(kind, v)) for kind, v in figures.get("changes", {}).items()),
        ("Quantization error of each layer", _errors(figures.get("quantization_error", {}))),
        ("Size by format", _sizes(figures.get("files", {}))),
        ("Run it", _commands(figures.get("commands", {}))),
        ("Time and memory", _pairs(_costs(figures))),
        ("Recipe", _pairs(figures.get("recipe", {}))),
        ("Versions", _pairs(figures.get("versions", {}))),
    ]
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>"
        for name, content in sections
        if content
    )
    if "not_measured" in figures:
        body += f'<p class="note">Not measured: {escape(figures["not_measured"])}</p>'
    if not charts.has_charts():
        body += '<p class="note">Charts need pygal: pip install ".[report]", in a clone.</p>'
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}: QA-LoRA report</title><style>{_STYLE}</style></head>"
        f"<body><h1>QA-LoRA run {escape(title)}</h1>{body}</body></html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; what is no text is a number, and stands to the right."""

    def cell(value: Any) -> str:
        kind = "" if isinstance(value, str) else ' class="number"'
        return f"<td{kind}>{escape(str(value))}</td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{titles}</tr>{lines}</table></div>' if lines else ""


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(
        ("", ""), [(name.replace("_", " "), str(value)) for name, value in values.items()]
    )


def _figure(svg: str | None) -> str:
    return f"<figure style='margin:0'>{svg}</figure>" if svg else ""


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    losses = {row["name"]: row["loss"] for row in rows if row["loss"] is not None}
    head = ("model", "held-out loss", "size, MB", "bits a weight")
    table = _table(
        head,
        [
            (r["name"], _number(r["loss"]), _number(r["size"] / 1e6), _number(r["bits_per_weight"]))
            for r in rows
        ],
    )
    chart = charts.bars("chart-stages", losses, "held-out loss, nats a token") if losses else None
    return table + _figure(chart)


def _losses(history: Sequence[Mapping[str, Any]]) -> str:
    names = {"loss": "training", "eval_loss": "held out"}
    series = {
        title: [(entry["step"], float(entry[key])) for entry in history if key in entry]
        for key, title in names.items()
    }
    series = {title: points for title, points in series.items() if points}
    if not series:
        return ""
    rows = [
        (title, step, _number(loss)) for title, points in series.items() for step, loss in points
    ]
    details = (
        f"<details><summary>as a table</summary>{_table(('', 'step', 'loss'), rows)}</details>"
    )
    return _figure(charts.lines("chart-loss", series, "step", "loss")) + details


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    names = {
        "prompt": "prompt",
        "expected": "expected",
        "before": "before training",
        "after": "after (merged)",
        "llama_cpp": "after, in llama.cpp",
    }
    lists = []
    for sample in samples:
        lines = [
            f"<dt>{title}</dt><dd><pre>{escape(str(sample[key]).strip())}</pre></dd>"
            for key, title in names.items()
            if sample.get(key)
        ]
        lists.append(f"<dl>{''.join(lines)}</dl>")
    return "<hr>".join(lists)


def _proof(proof: Mapping[str, Any] | None) -> str:
    if not proof:
        return "<p>Not verified here. <code>qalora report RUN_DIR</code> proves it.</p>"
    intro = (
        "<p><strong>Yes.</strong> Every tensor of the merged checkpoint is, bit for bit, what base "
        "and adapter give, and the integers are those of the base.</p>"
    )
    return intro + _pairs({name: value for name, value in proof.items() if value is not None})


def _heat_map(kind: str, values: Mapping[str, float]) -> str:
    """Return a table with one row a module and one column a block, coloured by the change."""
    largest = max(values.values(), default=0.0) or 1.0
    cells: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        found = re.search(r"\.(\d+)\.(.+)$", name)
        block, module = (int(found[1]), found[2]) if found else (0, name)
        cells.setdefault(module, {})[block] = value
    blocks = sorted({block for row in cells.values() for block in row})
    lines = []
    for module, row in cells.items():
        line = "".join(_coloured(module, b, row.get(b), largest) for b in blocks)
        lines.append(f"<tr><th>{escape(module)}</th>{line}</tr>")
    note = (
        f"{_KINDS[kind][1]}; blocks {blocks[0]} to {blocks[-1]} from left to right; "
        if blocks
        else ""
    )
    table = f'<table class="map" id="map-{escape(kind)}">{"".join(lines)}</table>'
    return (
        f'<div class="wide">{table}</div>'
        f'<p class="note">{note}<span class="scale">0 <span class="ramp"></span> '
        f"{_number(largest)}</span></p>"
    )


def _coloured(module: str, block: int, value: float | None, largest: float) -> str:
    if value is None:
        return "<td></td>"
    share = 100 * value / largest
    colour = f"color-mix(in srgb, var(--first) {share:.0f}%, var(--back))"
    title = escape(f"{module}, block {block}: {_number(value)}", quote=True)
    return f'<td style="background:{colour}" title="{title}"></td>'


def _errors(errors: Mapping[str, float]) -> str:
    if not errors:
        return ""
    points = {"error": [(float(n), float(value)) for n, value in enumerate(errors.values())]}
    chart = charts.lines(
        "chart-error", points, "layer, in the order of the model", "relative error"
    )
    rows = [(name, _number(value)) for name, value in errors.items()]
    table = f"<details><summary>as a table</summary>{_table(('layer', 'error'), rows)}</details>"
    note = '<p class="note">of a layer\'s output on the calibration inputs, against 16 bits</p>'
    return _figure(chart) + note + table


def _sizes(files: Mapping[str, int]) -> str:
    megabytes = {name: size / 1e6 for name, size in files.items()}
    chart = charts.bars("chart-size", megabytes, "MB") if megabytes else None
    return _table(("format", "MB"), [(n, _number(v)) for n, v in megabytes.items()]) + _figure(
        chart
    )


def _commands(commands: Mapping[str, str]) -> str:
    return "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(text)}</pre>" for name, text in commands.items()
    )


def _costs(figures: Mapping[str, Any]) -> dict[str, str]:
    seconds = {f"{name}, s": _number(v) for name, v in figures.get("seconds", {}).items()}
    memory = {f"{name}, MB": _number(v / 1e6) for name, v in figures.get("memory", {}).items()}
    return seconds | memory


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
