"""Compare two quantized bases, to know whether an adapter belongs to one."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BaseIdentity:
    """The facts that identify a quantized base, read from it or from an adapter's config.

    Args:
        bits: width of the integers; None where an adapter does not say.
        group_size: inputs that share a scale; None likewise.
        fingerprint: of the integers (see `fingerprint`); None where nobody computed it.
        base_merged: the `merged` record of what is merged into the base; None for nothing.
        base_refined: the `refined` record of a base whose scales and offsets were trained; the
            integers are those of the base without. None for one that was not refined.
        also: the fingerprint of the same integers under other names of the layers.
    """

    bits: int | None
    group_size: int | None
    fingerprint: str | None
    base_merged: dict[str, Any] | None
    base_refined: dict[str, Any] | None = None
    also: tuple[str, ...] = ()

    def difference(self, other: "BaseIdentity") -> str | None:
        """Return the name of the first field that differs; None where both are one base.

        A None differs from nothing, but in `base_merged` and `base_refined`, where it means that
        nothing is merged, and that the base is not refined.
        """
        for name in ("base_merged", "base_refined"):
            if getattr(self, name) != getattr(other, name):
                return name
        for name in ("bits", "group_size"):
            values = {getattr(self, name), getattr(other, name)} - {None}
            if len(values) > 1:
                return name
        marks = [{side.fingerprint, *side.also} - {None} for side in (self, other)]
        return "fingerprint" if all(marks) and marks[0].isdisjoint(marks[1]) else None
