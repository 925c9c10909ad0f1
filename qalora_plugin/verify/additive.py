"""What an adapter adds to a layer's output, written as the code that trained it computes it.

Nothing here is shared with the merge: no fold, no factors, no regrouping of A. `merge` holds a
merged layer against these formulas.
"""

import torch

from qalora_kernels import PackedWeight, reference
from qalora_kernels.groups import group_index

from ..formats.weights import ExactWeight
from ..merge.pairing import LayerMerge


def pooled(x: torch.Tensor, convention: str, pool_size: int) -> torch.Tensor:
    """Return the features [M, K // p] that each code pools from neighbouring inputs.

    Args:
        x: inputs of the layer, [M, K].
        convention: "mean": `AvgPool1d(p)`, as in the authors' released code; "peft": as in
            `peft.tuners.lora.variants.QALoraLinearVariant.forward`; "sum": the paper's sum.
        pool_size: p.
    """
    if convention == "mean":
        return torch.nn.functional.avg_pool1d(x.unsqueeze(1), pool_size).squeeze(1)
    features = x.shape[1] // pool_size
    if convention == "peft":
        return x.view(x.shape[0], features, pool_size).mean(dim=2) * features
    return x[:, : features * pool_size].view(x.shape[0], features, pool_size).sum(dim=2)


def pooled_change(
    x: torch.Tensor,
    merge: LayerMerge,
    matrices: tuple[torch.Tensor, torch.Tensor],
    convention: str | None,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what the change of zero-points adds to the output of a layer, [M, N] as x [M, K].

    Args:
        x: inputs of the layer.
        merge: the layer.
        matrices: A [r, columns] and B [N, r].
        convention: how the adapter pools; None for ours, which sums over the base's groups.
        g_idx: of the base's layer.
    """
    a, b = (matrix.to(x) for matrix in matrices)
    if convention is None:  # the last group may be short, and groups lie apart
        features = reference.pool(x, g_idx, merge.spec.group_size)
    else:
        features = pooled(x, convention, merge.pool_size)
    return features @ a.t() @ b.t() * merge.layer.scaling


def added_output(
    x: torch.Tensor,
    merge: LayerMerge,
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]],
    base: PackedWeight,
    convention: str | None,
) -> torch.Tensor:
    """Return what the adapter adds to the layer's output, float64 [M, N], for float64 x [M, K].

    Args:
        x: inputs of the layer.
        merge: the layer.
        matrices: A [r, columns] and B [N, r] of "zeros" and "scales".
        base: the base's weight of the layer.
        convention: how the adapter pools; None for ours, which sums over the base's groups.
    """
    spec, scaling = merge.spec, merge.layer.scaling
    added = x.new_zeros(x.shape[0], base.scales.shape[1])
    if "zeros" in matrices:
        added += pooled_change(x, merge, matrices["zeros"], convention, base.g_idx)
    if "scales" in matrices:
        # every weight of a group changes by the same share of itself
        a, b = (matrix.double() for matrix in matrices["scales"])
        share = (b @ a).t() * scaling
        index = group_index(base.g_idx, spec.group_size, spec.in_features, x.device)
        added += x @ (ExactWeight(base).values.t() * share[index.long()])
    return added
