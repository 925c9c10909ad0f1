"""The result of a quickstart as text and as JSON."""

from dataclasses import asdict

from ..files.json import json_text
from .run import Result


def as_json(result: Result) -> str:
    """Return the result for machines."""
    return json_text(asdict(result), sort_keys=False).rstrip()


def as_text(result: Result) -> str:
    """Return the result for people: one table, the proof, samples, and where things lie."""
    width = max(len(row.name) for row in result.rows)
    table = [
        f"{'model':<{width}}  held-out loss  size on disk  bits/weight",
        f"{'-' * width}  {'-' * 13}  {'-' * 12}  {'-' * 11}",
    ]
    for row in result.rows:
        size, bits = f"{row.size / 1e6:9.2f} MB", f"{row.bits_per_weight:11.2f}"
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        table.append(f"{row.name:<{width}}  {loss:>13}  {size}  {bits}")
    losses = {row.name: row.loss for row in result.rows if row.loss is not None}
    first, merged = next(iter(losses.items())), losses["merged"]
    lines = [
        *table,
        "",
        f"held-out loss, trained against the {first[0]}: {merged - first[1]:+.4f}",
        f"merged equals unmerged: {result.merged_equals_unmerged} (torch.equal on the logits; "
        f"{result.verified_layers} layers verified bit for bit; the integers never changed)",
        *([result.runtime] if result.runtime else []),
        "",
    ]
    for sample in result.samples:
        named = (
            ("prompt", sample.prompt),
            ("expected", sample.expected),
            ("before", sample.before),
            ("after (merged)", sample.after),
            ("after, in llama.cpp", sample.llama_cpp or ""),
        )
        for name, text in named:
            lines += [f"{name}:", _indented(text)] if text else []
        lines.append("")
    return "\n".join(
        [
            *lines,
            *(f"{name + ':':<10} {path}" for name, path in result.paths.items()),
            "time:      " + ", ".join(f"{n} {s:.0f} s" for n, s in result.seconds.items()),
            "memory:    " + ", ".join(f"{n} {m / 1e9:.1f} GB" for n, m in result.memory.items()),
        ]
    )


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
