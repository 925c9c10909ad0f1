"""A plan as text."""

from .memory import PARTS, MethodPlan
from .settings import PlanSettings

TITLES = {"qalora": "QA-LoRA", "lora": "LoRA", "qlora": "QLoRA"}
_LABELS = {
    "linear_weights": "integers (LoRA: 16-bit weights)",
    "scales_offsets": "scales and offsets",
    "rest": "embeddings, norms, head",
    "workspace": "workspace (dequantized layer, logits, loss)",
    "allocator": "freed blocks that malloc keeps",
    "communication": "communication, gathered parameters",
    "runtime": "runtime",
}


def gibibytes(nbytes: int) -> str:
    """Bytes as GiB, or MiB below a tenth of one."""
    size = nbytes / 2**30
    return f"{size:.2f} GiB" if size >= 0.1 or not nbytes else f"{nbytes / 2**20:.1f} MiB"


def table(
    plans: dict[str, MethodPlan], settings: PlanSettings, title: str, sizes: tuple[float, ...]
) -> str:
    """Methods side by side: memory by part, what fits where, sizes on disk."""
    where = "process" if settings.device == "cpu" else "GPU"
    rows = [[f"memory per {where}", *(TITLES[name] for name in plans)]]
    for part in PARTS:
        values = [plan.memory[part] for plan in plans.values()]
        if any(values):
            rows.append([_LABELS.get(part, part), *map(gibibytes, values)])
    rows.append(["total", *(gibibytes(plan.total) for plan in plans.values())])
    if any(plan.host for plan in plans.values()):
        rows.append(["host memory per GPU", *(gibibytes(p.host) for p in plans.values())])
    for size in sizes:
        answers = ["fits" if plan.fits(size) else "-" for plan in plans.values()]
        rows.append([f"on {size:g} GiB", *answers])
    for file in ("base", "adapter", "merged"):
        values = [plan.disk[file] for plan in plans.values()]
        rows.append([f"on disk: {file}", *map(gibibytes, values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{label:<{widths[0]}}", *right]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, "", *lines])
