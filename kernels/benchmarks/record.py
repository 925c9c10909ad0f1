"""The data file: one JSON object a line, each with the machine and commit that it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import measure

Row = dict[str, Any]


def describe(row: Row) -> str:
    """A row for the terminal."""
    shape = " ".join(f"{key}={row[key]}" for key in ("K", "N", "M", "bits", "timing") if key in row)
    name = row.get("variant") or row.get("ratio") or ""
    head = f"{row['operator']:<32} {name:<24} {shape:<32}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    if "ratio" in row:
        return f"{head} {row['ratio_median']:.3f}  ({row['ratio_q1']:.3f} to {row['ratio_q3']:.3f})"
    if "seconds_median" not in row:
        return f"{head} {row.get('result', '')}"
    middle, low, high = (row[f"seconds_{name}"] * 1e3 for name in ("median", "q1", "q3"))
    text = f"{head} {middle:9.4f} ms ({low:.4f} to {high:.4f})"
    if "peak_bytes" in row:
        mib = {
            k: row[f"{k}_bytes"] / 2**20 for k in ("peak", "weight", "saved") if f"{k}_bytes" in row
        }
        text += "  MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in mib.items())
    if "copy_fraction" in row:
        text += f"  copy {row['copy_fraction']:.2f}  gemm {row['gemm_fraction']:.2f}"
    return text


class DataFile:
    """Appends rows to a file and prints them.

    Args:
        path: the file; its directory is made.
        origin: what every row says of the run, see `measure.origin`.
    """

    def __init__(self, path: Path, origin: Row):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.origin = origin

    def add(self, row: Row) -> None:
        """Write one row."""
        print(describe(row), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.origin | row) + "\n")


def open_data_file(path: Path, device: str) -> tuple[DataFile, dict[str, float]]:
    """A data file whose rows name this machine and its limits, and the limits."""
    limits = measure.limits(device)
    return DataFile(path, measure.origin(device) | limits), limits


def read(path: Path) -> list[Row]:
    """All rows of a data file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
