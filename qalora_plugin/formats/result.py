"""`ExportResult`: what an export wrote, and how exactly."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]
"""Called with (tensors done, tensors in all)."""


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote.

    Args:
        out: the directory or file.
        format: name of the format.
        layers: number of quantized layers that were written as integers.
        exactness: how far the exported weights equal the source's, in one sentence.
        dense: layers that the format cannot hold as integers, and why, by name.
        measured: what an inexact export was measured to cost, see `gptq.requantize.Loss`.
    """

    out: Path
    format: str
    layers: int
    exactness: str
    dense: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return {**asdict(self), "out": str(self.out)}

    def as_text(self) -> str:
        """Return a few lines for people."""
        whys = set(self.dense.values())
        if not self.layers and len(whys) == 1:
            return (
                f"{self.out}: {len(self.dense)} layers in format {self.format}, all of them dense "
                f"({whys.pop()}). {self.exactness}"
            )
        lines = [f"{self.out}: {self.layers} layers in format {self.format}. {self.exactness}"]
        for why in sorted(whys):
            names = [name for name, reason in self.dense.items() if reason == why]
            lines.append(f"  {len(names)} layers dense, {names[0]} the first: {why}")
        return "\n".join(lines)
