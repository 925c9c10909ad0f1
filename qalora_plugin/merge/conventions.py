"""Adapters from elsewhere: what their pooling means for the groups of a quantized base.

Three pieces of code compute `y = x W^T + scaling * c * pool(x) A^T B^T` with pool a *sum* over p
neighbouring inputs, and differ in the factor c only:

    sum     c = 1            the paper (arXiv 2309.14717, Algorithm 1), and this package
    mean    c = 1 / p        the authors' released code: AvgPool1d(p), its merge divides by p
    peft    c = (K // p) / p PEFT's `use_qalora`: the mean, times the number of pooled features

p need not be the base's group size g. Where the groups nest, offsets can still hold the change:
p divides g: each group is split (its scale repeated, several offsets); p is a multiple of g:
neighbouring groups share a change. Ours pools over the base's own groups, act-order or not;
theirs over neighbouring inputs whatever the base's g_idx says.
"""

from dataclasses import dataclass

import torch

from qalora_kernels import QuantSpec

from ..errors import AdapterError

CONVENTIONS = ("sum", "mean", "peft")


def convention_factor(convention: str, pool_size: int, in_features: int) -> float:
    """Return c of the formula above for p = `pool_size` and K = `in_features`."""
    factors = {"sum": 1.0, "mean": 1 / pool_size, "peft": (in_features // pool_size) / pool_size}
    return factors[convention]


@dataclass(frozen=True)
class Regrouping:
    """The groups of a merged layer, made from the base's groups and the adapter's columns.

    Args:
        group_size: of the merged layer.
        base_group: int64 [G'], the base's group that each merged group takes its scale and offset
            from; None where the groups stay as they are.
        column: int64 [G'], the column of A that changes each group, -1 for none; None where
            column j changes group j.
    """

    group_size: int
    base_group: torch.Tensor | None = None
    column: torch.Tensor | None = None

    def split(self, per_group: torch.Tensor) -> torch.Tensor:
        """Return [G', N] of the merged layer from [G, N] of the base."""
        return per_group if self.base_group is None else per_group.index_select(0, self.base_group)

    def spread(self, a: torch.Tensor) -> torch.Tensor:
        """Return A as [r, G'] from A [r, pooled features]."""
        if self.column is None:
            return a
        padded = torch.nn.functional.pad(a, (0, 1))  # column -1: a group that is not pooled
        return padded.index_select(1, self.column % padded.shape[1])


def pool_size_of(name: str, columns: int, spec: QuantSpec, stated: int | None) -> int:
    """Return p of a layer: stated by the adapter, else found from the number of A's columns.

    Raises:
        AdapterError: A is that of plain LoRA, or fits no pooling of this layer.
    """
    k = spec.in_features
    if columns == k:
        raise AdapterError(
            f"{name}.lora_A.weight: {columns} columns, one for each input: this is plain LoRA, "
            "which does not merge into groups of offsets. Only adapters trained with pooling do."
        )
    if stated is not None:
        if columns != k // stated:
            raise AdapterError(
                f"{name}.lora_A.weight: expected {k // stated} columns "
                f"({k} inputs, qalora_group_size {stated}), found {columns}."
            )
        return stated
    # AvgPool1d leaves an incomplete last window out, hence the floor
    if columns == k // spec.group_size:
        return spec.group_size
    if columns and k % columns == 0:
        return k // columns
    raise AdapterError(
        f"{name}.lora_A.weight: {columns} columns fit no pooling of {k} inputs "
        f"(groups of {spec.group_size} would be {k // spec.group_size}). Is it for another base?"
    )


def regroup(name: str, spec: QuantSpec, g_idx: torch.Tensor | None, pool_size: int) -> Regrouping:
    """Fit pooling over `pool_size` neighbouring inputs to the groups of a base layer.

    Raises:
        AdapterError: some group lies in several pools, and no split of the groups helps.
    """
    k, g, groups = spec.in_features, spec.group_size, spec.num_groups
    pools = k // pool_size
    inputs = torch.arange(k)
    pool = torch.where(inputs // pool_size < pools, inputs // pool_size, -1)
    if g_idx is not None:
        return _regroup_act_order(name, spec, g_idx, pool, pool_size)
    if pool_size == g and pools == groups:
        return Regrouping(g)
    if pool_size % g == 0 or (pools == 1 and pool_size == k):
        return Regrouping(g, column=pool[torch.arange(groups) * g])
    if g % pool_size == 0 or groups == 1:
        starts = torch.arange(-(-k // pool_size)) * pool_size
        return Regrouping(pool_size, base_group=starts // g, column=pool[starts])
    raise AdapterError(
        f"{name}: the adapter pools {pool_size} neighbouring inputs, the base's groups have {g}. "
        "Neither divides the other, so some groups would need two offsets at once: this adapter "
        f"cannot be merged into this base. Quantize the base with a group size that {pool_size} "
        "divides, or that divides it."
    )


def _regroup_act_order(
    name: str, spec: QuantSpec, g_idx: torch.Tensor, pool: torch.Tensor, pool_size: int
) -> Regrouping:
    """Fit act-order groups: only offsets can change, so each has to lie within one pool."""
    first = torch.full((spec.num_groups,), -2, dtype=torch.long)
    index = g_idx.long()
    first[index] = pool  # the pool of one member of each group
    if not torch.equal(first[index], pool):
        raise AdapterError(
            f"{name}: the adapter pools {pool_size} neighbouring inputs, but the base's groups "
            "follow act-order (g_idx): members of one group lie in different pools, so no offset "
            "of the group holds the change. It cannot be merged: use a base quantized with "
            "desc_act=False, or train with QALoRAConfig, which pools by g_idx."
        )
    return Regrouping(spec.group_size, column=first.clamp(min=-1))
