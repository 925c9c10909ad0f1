"""The runs of the mode comparison that are still to be made, and the rows of those that were.

The learning rate is swept first; the other seeds follow at the best rate.
"""

from collections.abc import Iterable

from rows import Row

Run = tuple[str, int, float, int]
"""Method, bits, learning rate, seed. `lora+gptq` and `lora` are rows of the same training."""

BITS = (4, 3, 2)
METHODS = ("lora", "lora+gptq", "peqa", "zeros", "scales", "both")
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
FIRST_RATES = RATES[1:4]
SEEDS = (0, 1, 2)


def cells(methods: Iterable[str]) -> list[tuple[str, int]]:
    """Return method and bits of everything that is compared; `lora` is 16 bits wide."""
    return [(name, b) for name in methods for b in ((16,) if name == "lora" else BITS)]


def cell(rows: list[Row], method: str, bits: int) -> list[Row]:
    """Return the rows of one method at one width."""
    return [row for row in rows if (row["method"], row["bits"]) == (method, bits)]


def best_rate(rows: list[Row], method: str) -> float | None:
    """Return the swept rate with the lowest validation loss, at the first width and first seed."""
    bits = cells([method])[0][1]
    swept = [row for row in cell(rows, method, bits) if row["seed"] == SEEDS[0]]
    return min(swept, key=lambda row: row["validation_loss"])["lr"] if swept else None


def missing(rows: list[Row], method: str, bits: int) -> list[Run]:
    """Return the runs that a cell lacks.

    These are the first rates, then the rates beside the best one, then the other seeds. Only the
    first width of a method is swept; the others take its rate.
    """
    sweep = cells([method])[0][1]
    swept = {row["lr"] for row in cell(rows, method, sweep) if row["seed"] == SEEDS[0]}
    wanted = set(FIRST_RATES)
    if swept >= wanted:
        best = RATES.index(best_rate(rows, method))
        wanted = set(RATES[max(best - 1, 0) : best + 2])
    if not swept >= wanted:
        return [(method, sweep, rate, SEEDS[0]) for rate in sorted(wanted - swept)]
    have = {(row["lr"], row["seed"]) for row in cell(rows, method, bits)}
    return [(method, bits, RATES[best], s) for s in SEEDS if (RATES[best], s) not in have]


def final_rows(rows: list[Row], method: str, bits: int) -> list[Row]:
    """Return the cell's rows at the method's best rate, one a seed; none before the first run."""
    rate = best_rate(rows, method)
    return [row for row in cell(rows, method, bits) if row["lr"] == rate]
