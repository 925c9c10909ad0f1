"""The `merged` entry of a quantization config: which adapters were merged into a base.

    in memory (`merge_and_unload`)    the fields of `MergedAdapter` that are known there, and
                                      `before` if the base was merged already; of several adapters
                                      {adapter, peft_type, adapters: [...]}
    from files (`merge_adapter`)      all fields, and `base_merged`

The two are kept apart so that a merge writes the same bytes as in earlier releases.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MergedAdapter:
    """The entry of one merged adapter.

    Args:
        adapter: its name, or the last part of its directory: the rest of the path is private.
        adapter_sha256: of its file of tensors; None in memory.
        peft_type: "QALORA" or "LORA".
        convention: "sum", "mean" or "peft".
        adapt: "zeros", "scales" or "both".
        r: rank.
        lora_alpha: see `tuner.scaling`.
        layers: how many it is on; None in memory.
        modules_to_save: modules (in memory) or tensors (from files) that it replaces, sorted.
    """

    adapter: str
    adapter_sha256: str | None = None
    peft_type: str
    convention: str
    adapt: str
    r: int
    lora_alpha: float
    layers: int | None = None
    modules_to_save: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are known, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def merged_in_memory(
    adapters: Sequence[MergedAdapter], before: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the entry of a merge in memory; `before` is the base's own, None if it has none."""
    records = [adapter.as_dict() for adapter in adapters]
    merged = records[0]
    if len(records) > 1:
        names = ", ".join(adapter.adapter for adapter in adapters)
        merged = {"adapter": names, "peft_type": adapters[0].peft_type, "adapters": records}
    return merged if before is None else merged | {"before": before}


def merged_from_files(adapter: MergedAdapter, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a merge from files; `before` is the base's own, None if it has none."""
    return adapter.as_dict() | {"base_merged": before}
