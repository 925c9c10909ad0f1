"""The rows of compare_quantizers.py as a table, and as two sentences."""

import math
import statistics
import textwrap

from rows import Row, markdown, spread

TEXTS = ("sources", "completions", "prompts", "pairs", "wikitext2")
UNQUANTIZED = {"none": "", "softened": "logits divided by 1.1"}
NAMES = {
    "qalora": "qalora",
    "qalora-minimum": "qalora (minimum)",
    "qalora-refined": "qalora --refine",
    "gptqmodel": "GPTQModel",
}
FIGURES = {"heldout_loss": "held-out loss", "heldout_kl": "KL from 16 bits"}


def draws(rows: list[Row]) -> dict[tuple[str, bool, int], dict[str, list[Row]]]:
    """Return the rows of every quantizer by text, act-order or not, and bits, in their order."""
    found: dict[tuple[str, bool, int], dict[str, list[Row]]] = {}
    engines = list(NAMES)

    def order(row: Row) -> tuple[int, bool, int, int]:
        text, engine = TEXTS.index(row["text"]), engines.index(row["engine"])
        return text, row["desc_act"], -row["bits"], engine

    for row in sorted((row for row in rows if row["engine"] in NAMES), key=order):
        setting = row["text"], row["desc_act"], row["bits"]
        found.setdefault(setting, {}).setdefault(row["engine"], []).append(row)
    return found


def table(rows: list[Row]) -> str:
    """Return the table of mean and standard deviation over the draws of each setting."""
    lines = []
    for text in TEXTS:
        for row in rows:
            if row["text"] == text and row["engine"] in UNQUANTIZED:
                figures = [f"{row[figure]:.4f}" for figure in FIGURES]
                lines.append([text, "16", "", UNQUANTIZED[row["engine"]], *figures, ""])
        for (judged, desc_act, bits), engines in draws(rows).items():
            for name, same in engines.items() if judged == text else ():
                setting = [text, f"{bits}", "yes" if desc_act else "no"]
                figures = [spread(same, figure, 4) for figure in FIGURES]
                quantizer = f"{NAMES[name]} {same[0]['version']}"
                lines.append([*setting, quantizer, *figures, f"{len(same)}"])
    return markdown(["text", "bits", "act-order", "quantizer", *FIGURES.values(), "draws"], lines)


def real_model(rows: list[Row]) -> str:
    """Return the table of a language model, one draw: perplexity, KL and cost of each quantizer."""
    lines = []
    whole = [row for row in rows if row["engine"] == "none"]
    by_setting = [same for engines in draws(rows).values() for same in engines.values()]
    plain = {row["bits"]: row for row in rows if row["engine"] == "qalora"}
    for row in (*whole, *(row for same in by_setting for row in same)):
        name = NAMES.get(row["engine"])
        figures = [f"{math.exp(row['heldout_loss']):.2f}", f"{row['heldout_kl']:.4f}"]
        ours = plain.get(row["bits"])
        figures.append(f"{row['heldout_kl'] / ours['heldout_kl']:.2f}" if ours else "")
        cost = f"{row['seconds'] / 60:.0f}" if name else ""
        group = str(row["group_size"] or "")
        quantizer = f"{name} {row['version']}" if name else "not quantized"
        if "refine_rate" in row:
            quantizer += f", {row['refine_steps']} steps at {row['refine_rate']}"
            quantizer += ", norms too" if row["refine_norms"] else ""
        lines.append([f"{row['bits']}", group, quantizer, *figures, cost])
    head = [
        "bits",
        "group size",
        "quantizer",
        "perplexity",
        "KL from 16 bits",
        "of plain GPTQ's",
        "minutes",
    ]
    return markdown(head, lines)


def summary(rows: list[Row]) -> str:
    """Return the range of our figures over, or from, GPTQModel's, in two sentences."""

    def mean(same: list[Row], figure: str) -> float:
        return statistics.fmean(row[figure] for row in same)

    pairs = [(found["qalora"], found["gptqmodel"]) for found in draws(rows).values()]
    ratios = [mean(ours, "heldout_kl") / mean(theirs, "heldout_kl") for ours, theirs in pairs]
    gains = [mean(theirs, "heldout_loss") - mean(ours, "heldout_loss") for ours, theirs in pairs]
    return textwrap.fill(
        f"At 4, 3 and 2 bits the base that `qalora quantize` makes has {min(ratios):.2f} to "
        f"{max(ratios):.2f} times the KL divergence from the 16-bit model that GPTQModel's has, in "
        f"all {len(pairs)} settings of text, bits and act-order that were measured. Its held-out "
        f"loss is lower in {sum(gain > 0 for gain in gains)} of them, by up to {max(gains):.3f} "
        f"nats, and higher by at most {-min(gains):.4f} in the others.",
        width=100,
    )
