"""What the measurements are held to: one line a bound, met or missed, with the number.

    python gpu_bounds.py OUT_DIR

reads stage*.jsonl there. A bound whose measurement is missing says so, and why a peer did not run.
Where a row was measured more than once, the last one counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

BIG = 64 << 20  # bytes of W in bf16 from which generation is held to the copy bandwidth
KEYS = ("operator", "timing", "variant", "ratio", "K", "N", "M", "bits", "group_size")
Key = tuple[Any, ...]


@dataclass
class Verdict:
    """One bound on one measurement."""

    bound: str
    where: str
    number: float | None = None
    met: bool | None = None
    note: str = ""

    def __str__(self) -> str:
        state = {True: "met   ", False: "MISSED", None: "absent"}[self.met]
        number = "" if self.number is None else f"{self.number:.3g}"
        return f"{state} {number:>8}  {self.bound:<58} {self.where}{self.note}"


def load(directory: Path) -> dict[Key, record.Row]:
    """The last row of each measurement; one that ran counts more than one that did not."""
    rows: dict[Key, record.Row] = {}
    for path in sorted(directory.glob("stage*.jsonl")):
        for row in record.read(path):
            key = tuple(row.get(name) for name in KEYS)
            if "not_run" not in row or key not in rows:
                rows[key] = row
    return rows


class Judge:
    """Looks measurements up and compares them."""

    def __init__(self, rows: dict[Key, record.Row]):
        self.rows = list(rows.values())

    def find(self, **wanted: Any) -> list[record.Row]:
        """Rows with these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())]

    def ratio(self, bound: str, limit: float, numerator: str, peer: str, **where: Any) -> Verdict:
        """Is `numerator / peer`, a median of ratios taken round by round, at most `limit`?"""
        place = " ".join(f"{k}={v}" for k, v in where.items() if k != "operator")
        place = f"{where['operator']} {place}"
        for row in self.find(ratio=f"{numerator} / {peer}", **where):
            number = row["ratio_median"]
            spread = f"  ({row['ratio_q1']:.3g} to {row['ratio_q3']:.3g})"
            return Verdict(bound, place, number, number <= limit, spread)
        where.pop("timing", None)  # a peer that cannot be built has no timing
        missing = [r["not_run"] for r in self.find(variant=peer, **where) if "not_run" in r]
        reason = f"  {peer} did not run: {missing[-1]}" if missing else "  not measured"
        return Verdict(bound, place, note=reason)


def decoder(judge: Judge) -> Iterator[Verdict]:
    """Training: the layer against the bare products, LoRA and QLoRA."""
    rows = sorted({r["M"] for r in judge.find(operator="decoder layer", variant="qalora")})
    for m in rows:
        for timing in ("eager", "graph"):
            layer = {"operator": "decoder layer", "timing": timing, "M": m}
            linears = layer | {"operator": "linears of the layer"}
            limit = 1.15 if m < 8192 else 1.10
            if m >= 4096 or rows[-1] < 4096:  # a rehearsal has small ones only
                bound = f"at most {limit:.2f} x the frozen bf16 layer"
                yield judge.ratio(bound, limit, "qalora", "frozen", **layer)
                bound = f"at most {limit:.2f} x the bare bf16 GEMMs"
                yield judge.ratio(bound, limit, "qalora", "gemms", **linears)
            for peer, factor in (("lora", 1.2), ("lora_fp32", 1.2), ("qlora_nf4", 1.3)):
                bound = f"{factor} x faster than {peer} (ratio at most {1 / factor:.3f})"
                yield judge.ratio(bound, 1 / factor, "qalora", peer, **layer)


def generation(judge: Judge) -> Iterator[Verdict]:
    """One to sixteen rows: copy bandwidth, peers, and fewer bits faster."""
    ours = judge.find(operator="linear", timing="graph", variant="qalora")
    for row in ours:
        if row["M"] == 1 and row["K"] * row["N"] * 2 > BIG:
            where = f"linear K={row['K']} N={row['N']} M=1 bits={row['bits']}"
            number = row["copy_fraction"]
            yield Verdict("at least 0.75 of the copy bandwidth", where, number, number >= 0.75)
    for row in ours:
        shape = {k: row[k] for k in ("operator", "timing", "K", "N", "M", "bits")}
        if row["M"] not in (1, 16):
            continue
        for peer in ("tinygemm", "gemlite"):
            if row["bits"] != 4 and not judge.find(ratio=f"qalora / {peer}", **shape):
                continue  # 4 bits are what both have and what is asked for
            yield judge.ratio(f"faster than {peer}", 1.0, "qalora", peer, **shape)
        if row["bits"] in (2, 3):
            (four, *_) = judge.find(variant="qalora", **shape | {"bits": 4}) or [None]
            where = f"linear K={row['K']} N={row['N']} M={row['M']} bits={row['bits']}"
            if four:
                number = row["seconds_median"] / four["seconds_median"]
                yield Verdict("faster than 4 bits", where, number, number < 1)


def crossover(judge: Judge) -> Iterator[Verdict]:
    """Any number of rows: never 10% slower than dense bf16; the worst M of each shape."""
    worst: dict[Key, record.Row] = {}
    for row in judge.find(operator="linear", timing="graph", ratio="qalora / dense"):
        key = (row["K"], row["N"], row["bits"])
        if key not in worst or row["ratio_median"] > worst[key]["ratio_median"]:
            worst[key] = row
    for (k, n, bits), row in worst.items():
        number = row["ratio_median"]
        where = f"linear K={k} N={n} bits={bits}, worst at M={row['M']}"
        yield Verdict("at most 1.10 x dense bf16 at any M", where, number, number <= 1.10)


def whole_model(judge: Judge) -> Iterator[Verdict]:
    """SFTTrainer: 1.2 times QLoRA's tokens a second, in less memory."""
    for ours in judge.find(variant="qalora-4"):
        operator = {"operator": ours["operator"]}
        bound = f"1.2 x QLoRA's tokens/s (ratio at most {1 / 1.2:.3f})"
        yield judge.ratio(bound, 1 / 1.2, "qalora-4", "qlora", **operator)
        for peer in judge.find(variant="qlora", **operator):
            if "peak_bytes" in peer:
                number = ours["peak_bytes"] / peer["peak_bytes"]
                yield Verdict("less peak memory than QLoRA", ours["operator"], number, number < 1)


def correctness(judge: Judge) -> Iterator[Verdict]:
    """Stage 1."""
    for name in ("kernel tests", "GPU tests"):
        for row in judge.find(operator=name):
            if "failed" in row:
                count = len(row["failed"])
                met = row["exit_status"] == 0
                yield Verdict(f"{name} pass", row["result"], count, met)
            else:
                yield Verdict(f"{name} pass", row["not_run"])
    for row in judge.find(operator="memcheck"):
        if "errors" in row:
            met = row["errors"] == 0 and row["exit_status"] == 0
            yield Verdict("no memory errors", row["result"], row["errors"], met)
        else:
            yield Verdict("no memory errors", row["not_run"])


def verdicts(directory: Path) -> list[Verdict]:
    """All bounds, in the order of the stages."""
    judge = Judge(load(directory))
    checks = (correctness, decoder, generation, crossover, whole_model)
    return [verdict for check in checks for verdict in check(judge)]


def summary(directory: Path) -> str:
    """The verdicts and the machine that they are about."""
    found = verdicts(directory)
    counts = [sum(v.met is state for v in found) for state in (True, False, None)]
    head = "{} bounds met, {} missed, {} absent".format(*counts)
    machines = {
        f"{row['device']}, driver {row.get('driver', '-')}, torch {row['torch']}, "
        f"triton {row.get('triton', '-')}, commit {row['commit']}"
        for row in load(directory).values()
    }
    return "\n".join([head, *sorted(machines), "", *map(str, found)]) + "\n"


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
