"""How a quickstart result is printed."""

from dataclasses import asdict

from ..files.json import json_text
from .run import Result


def as_json(result: Result) -> str:
    """The result for machines."""
    return json_text(asdict(result), sort_keys=False).rstrip()


def as_text(result: Result) -> str:
    """The result for people: one table, the proof, a sample, and where things lie."""
    width = max(len(row.name) for row in result.rows)
    lines = [
        f"{'model':<{width}}  held-out loss  size on disk  bits/weight",
        f"{'-' * width}  {'-' * 13}  {'-' * 12}  {'-' * 11}",
    ]
    lines += [
        f"{row.name:<{width}}  {row.loss:13.4f}  {row.size / 1e6:9.2f} MB  "
        f"{row.bits_per_weight:11.2f}"
        for row in result.rows
    ]
    base, _, adapted, merged = result.rows
    lines += [
        "",
        f"held-out loss, adapter on INT-n against the 16-bit base: {adapted.loss - base.loss:+.4f}",
        f"merged equals unmerged: {result.merged_equals_unmerged} (torch.equal on the logits; "
        f"{result.verified_layers} layers verified bit for bit; the integers never changed; "
        f"loss {merged.loss:.6f} against {adapted.loss:.6f})",
        "",
        "prompt:",
        _indent(result.prompt),
        "before (quantized base):",
        _indent(result.before),
        "after (merged):",
        _indent(result.after),
        "",
        *(f"{name + ':':<10} {path}" for name, path in result.paths.items()),
        "time:      " + ", ".join(f"{n} {s:.0f} s" for n, s in result.seconds.items()),
    ]
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines())
