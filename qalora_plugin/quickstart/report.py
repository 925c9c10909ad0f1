"""The result of a quickstart as text and as JSON."""

from dataclasses import asdict

from ..files.json import json_text
from .run import Result


def as_json(result: Result) -> str:
    """Return the result for machines."""
    return json_text(asdict(result), sort_keys=False).rstrip()


def as_text(result: Result) -> str:
    """Return the result for people: one table, the proof, a sample, and where things lie."""
    width = max(len(row.name) for row in result.rows)
    table = [
        f"{'model':<{width}}  held-out loss  size on disk  bits/weight",
        f"{'-' * width}  {'-' * 13}  {'-' * 12}  {'-' * 11}",
    ]
    for row in result.rows:
        size, bits = f"{row.size / 1e6:9.2f} MB", f"{row.bits_per_weight:11.2f}"
        table.append(f"{row.name:<{width}}  {row.loss:13.4f}  {size}  {bits}")
    base, _, adapted, merged = result.rows
    return "\n".join(
        [
            *table,
            "",
            "held-out loss, adapter on INT-n against the 16-bit base: "
            f"{adapted.loss - base.loss:+.4f}",
            f"merged equals unmerged: {result.merged_equals_unmerged} (torch.equal on the logits; "
            f"{result.verified_layers} layers verified bit for bit; the integers never changed; "
            f"loss {merged.loss:.6f} against {adapted.loss:.6f})",
            "",
            "prompt:",
            _indented(result.prompt),
            "before (quantized base):",
            _indented(result.before),
            "after (merged):",
            _indented(result.after),
            "",
            *(f"{name + ':':<10} {path}" for name, path in result.paths.items()),
            "time:      " + ", ".join(f"{n} {s:.0f} s" for n, s in result.seconds.items()),
        ]
    )


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
