"""A plan as text."""

from .memory import PARTS, MethodPlan
from .settings import PlanSettings

TITLES = {"qalora": "QA-LoRA", "lora": "LoRA", "qlora": "QLoRA"}
_LABELS = {
    "linear_weights": "integers (LoRA: 16-bit weights)",
    "scales_offsets": "scales and offsets",
    "rest": "embeddings, norms, head",
    "workspace": "workspace (dequantized layer, logits, loss)",
    "communication": "communication, gathered parameters",
}
_NOTE = "These are allocated bytes. Resident memory is more, as the allocator keeps freed blocks."


def gibibytes(nbytes: int) -> str:
    """Write bytes as GiB, or as MiB below a tenth of one."""
    size = nbytes / 2**30
    return f"{size:.2f} GiB" if size >= 0.1 or not nbytes else f"{nbytes / 2**20:.1f} MiB"


def table(
    plans: dict[str, MethodPlan], settings: PlanSettings, title: str, sizes: tuple[float, ...]
) -> str:
    """Write the methods side by side: memory by part, what fits where, sizes on disk.

    Args:
        plans: the plan of each method, by its name.
        settings: of the run.
        title: the first line.
        sizes: of the GPUs, in GiB.
    """
    found = list(plans.values())

    def row(label: str, values: list[int]) -> list[str]:
        return [label, *map(gibibytes, values)]

    cpu = settings.device == "cpu"
    rows = [[f"memory per {'process' if cpu else 'GPU'}", *(TITLES[name] for name in plans)]]
    for part in PARTS:
        values = [plan.memory[part] for plan in found]
        if any(values):
            rows.append(row(_LABELS.get(part, part), values))
    rows.append(row("total", [plan.total for plan in found]))
    if any(plan.host for plan in found):
        rows.append(row("host memory per GPU", [plan.host for plan in found]))
    for size in sizes:
        rows.append([f"on {size:g} GiB", *("fits" if plan.fits(size) else "-" for plan in found)])
    for file in ("base", "adapter", "merged"):
        rows.append(row(f"on disk: {file}", [plan.disk[file] for plan in found]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{label:<{widths[0]}}", *right]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title, "", *lines, "", _NOTE])
