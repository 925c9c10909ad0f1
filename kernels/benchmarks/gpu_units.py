"""What `gpu_run.py` runs on a GPU, and what each number is held to: one table.

The bounds are those that the kernels were designed for; what is expected is derived in NOTES.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import measure
from measure import Row


@dataclass(frozen=True)
class Bound:
    """What a number is held to: `number` of the last row that has the values of `row`.

    It is divided by that of the row which differs in `over`, where that is given.
    """

    text: str
    row: Row
    number: str
    most: float = math.inf
    least: float = -math.inf
    over: Row | None = None
    expected: str = ""  # see NOTES.md

    def judge(self, rows: list[Row]) -> tuple[bool | None, float | None, str]:
        """Return whether the rows meet the bound (None: not measured), the number, and a note."""

        def last(wanted: Row) -> Row | None:
            found = [row for row in rows if self.number in row and wanted.items() <= row.items()]
            return found[-1] if found else None

        row = last(self.row)
        other = last(self.row | self.over) if self.over else {self.number: 1.0}
        if row is None or other is None:
            peer = self.row.get("ratio", "").removeprefix("qalora / ") or self.row.get("variant")
            peer = {"operator": self.row.get("operator"), "variant": peer}
            reasons = [r["not_run"] for r in rows if "not_run" in r and peer.items() <= r.items()]
            return None, None, reasons[-1] if reasons else "not measured"
        number = row[self.number] / other[self.number]
        note = f"{row['ratio_q1']} to {row['ratio_q3']}" if "ratio" in row else row.get("result")
        return self.least <= number <= self.most, number, note or ""

    def line(self, rows: list[Row]) -> str:
        """Return the verdict, the number beside what was expected, and the bound."""
        met, number, note = self.judge(rows)
        state = {True: "met", False: "MISSED", None: "absent"}[met]
        value = "" if number is None else f"{number:.3g}"
        expected = f"(expected {self.expected})" if self.expected else ""
        where = " ".join(f"{key}={value}" for key, value in self.row.items() if key != "ratio")
        return f"{state:<7}{value:>7} {expected:<24} {self.text}: {where}  {note}"


@dataclass(frozen=True)
class Unit:
    """One command: "bench ARGUMENTS", "pytest ARGUMENTS", or "memcheck ARGUMENTS" (of pytest)."""

    name: str
    stage: int  # rows of bench go to stage<N>.jsonl
    limit: int  # seconds after which it is stopped
    command: str
    bounds: list[Bound]


def _ratio(text: str, peer: str, most: float, row: Row, expected: str = "") -> Bound:
    """Bound the median of ratios of times, taken round by round."""
    return Bound(text, row | {"ratio": f"qalora / {peer}"}, "ratio_median", most, expected=expected)


def _layer(m: int, most: float, expected: str) -> list[Bound]:
    bounds = []
    for timing in ("eager", "graph"):
        whole = {"operator": "decoder layer", "timing": timing, "M": m}
        bare = whole | {"operator": "linears of the layer"}
        bounds += [
            _ratio(f"at most {most} x the bare bf16 products", "frozen", most, bare, expected),
            _ratio("1.2 x as fast as LoRA", "lora", 1 / 1.2, whole),
            _ratio("1.3 x as fast as QLoRA", "qlora_nf4", 1 / 1.3, whole),
        ]
    return bounds


def _linear(shape: str, m: int, bits: int = 4) -> Row:
    k, n = map(int, shape.split("x"))
    return {"operator": "linear", "timing": "graph", "K": k, "N": n, "M": m, "bits": bits}


def _one_row(shape: str) -> list[Bound]:
    row = _linear(shape, 1) | {"variant": "qalora"}
    copied = Bound("copy bandwidth", row, "copy_fraction", least=0.75, expected="0.60 to 0.75")
    bounds = [copied]
    bounds += [_ratio("faster than tinygemm", "tinygemm", 1, _linear(shape, m)) for m in (1, 16)]
    for bits, expected in ((2, "0.80 to 0.91"), (3, "1")):
        text, fewer = f"{bits} bits faster than 4 bits", row | {"bits": bits}
        bounds.append(Bound(text, fewer, "seconds_median", 1, over={"bits": 4}, expected=expected))
    return bounds


def _sft(name: str) -> list[Bound]:
    row = {"operator": f"SFT {name}"}
    ours, theirs = row | {"variant": "qalora"}, {"variant": "qlora_nf4"}
    return [
        _ratio("1.2 x QLoRA's tokens a second", "qlora_nf4", 1 / 1.2, row),
        _ratio("faster than LoRA", "lora", 1, row),
        Bound("less peak memory than QLoRA", ours, "peak_bytes", 1, over=theirs),
        Bound("peak memory as `qalora plan` says", ours, "peak_over_plan", 1.15, 0.85),
    ]


def units(rehearse: bool = False) -> list[Unit]:
    """Return all units, the most wanted first; for a rehearsal on tiny shapes."""
    tests, checked = "tests/kernels -m 'not slow or gpu' -n 12", "triton"
    (m1, m2), (small, large), many = (
        (4096, 8192),
        ("4096x11008", "8192x28672"),
        (64, 512, 2048, 16384),
    )
    rounds, layer, model, sft = "--rounds 9", "--rounds 25", "1.1B", "--rounds 30"
    if rehearse:
        tests, checked = "tests/kernels/test_checks.py", "'triton and of_the_grid and even'"
        (m1, m2), (small, large), many = (32, 64), ("64x96", "96x64"), (32, 64, 96, 128)
        rounds, layer, model = "--rounds 2", "--rounds 2 --model tiny --sequence 16", "tiny"
        sft = "--rounds 5 --variants qalora lora --batch 2 --sequence 32 --rank 4"
    linear = f"bench --only linear {rounds} --shapes"
    one = f"{linear} {small} {large} --rows 1 16 --bits"
    of_many = " ".join(map(str, many))
    passed = Bound("all pass", {"unit": "kernel tests"}, "exit_status", 0)
    clean = Bound("no error", {"unit": "memcheck"}, "exit_status", 0)
    layer1, layer2 = _layer(m1, 1.15, "1.12 to 1.15"), _layer(m2, 1.10, "1.08 to 1.11")
    copied = Bound("copy bandwidth", {"operator": "dequantize"}, "copy_fraction", least=0.85)
    gemlite = [
        _ratio("faster than gemlite", "gemlite", 1, _linear(shape, m))
        for shape in (small, large)
        for m in (1, 16)
    ]
    slow = [
        _ratio("at most 1.1 x dense bf16", "dense", 1.1, _linear(small, m), expected)
        for m, expected in zip(many, ("1.2 to 1.6", "1.2 to 1.6", "1.1", "1.0"), strict=True)
    ]
    memcheck = f"memcheck tests/kernels/test_operators.py -k {checked}"
    operators = f"bench --only operators {rounds} --shapes {small} --bits 4 --rows 1 {m1}"
    return [
        Unit("kernel tests", 1, 160, f"pytest {tests}", [passed]),
        Unit("memcheck", 1, 80, memcheck, [clean]),
        Unit(f"decoder layer {m1}", 2, 70, f"bench --only layer --rows {m1} {layer}", layer1),
        Unit(f"decoder layer {m2}", 2, 70, f"bench --only layer --rows {m2} {layer}", layer2),
        Unit("one row", 2, 110, f"{one} 4 2 3", [*_one_row(small), *_one_row(large)]),
        Unit("SFTTrainer", 3, 180, f"bench --only sft --model {model} {sft}", _sft(model)),
        Unit("many rows", 4, 60, f"{linear} {small} --bits 4 --rows {of_many} --peers", slow),
        Unit("gemlite", 4, 70, f"{one} 4 --peers gemlite", gemlite),
        Unit("operators", 4, 40, operators, [copied]),
    ]


def summary(directory: Path, rehearse: bool = False) -> str:
    """Judge the data files of a directory by all bounds, and name the machines that they are of."""
    paths = [*sorted(directory.glob("stage*.jsonl")), directory / "units.jsonl"]
    rows = [row for path in paths for row in measure.read(path)]
    lines = [bound.line(rows) for unit in units(rehearse) for bound in unit.bounds]
    states = [line.split()[0] for line in lines]
    counts = ", ".join(f"{states.count(s)} {s.lower()}" for s in ("met", "MISSED", "absent"))
    keys = ("device", "driver", "torch", "triton", "commit")
    machines = {", ".join(f"{k} {row[k]}" for k in keys if k in row) for row in rows} - {""}
    return "\n".join([f"bounds: {counts}", *sorted(machines), "", *lines]) + "\n"
