"""What an adapter adds to a layer's output, written as the code that trained it computes it.

Nothing here is shared with the merge: no fold, no factors, no regrouping of A. `verify` holds a
merged layer against these formulas.
"""

import torch

from qalora_kernels import PackedWeight, QuantSpec, reference
from qalora_kernels.groups import group_index

from .checkpoint.base import LayerTensors
from .pairing import LayerMerge


def pooled(x: torch.Tensor, convention: str, pool_size: int) -> torch.Tensor:
    """x [M, K] -> [M, K // p] as each code pools neighbouring inputs.

    Args:
        x: inputs of the layer.
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


def columns(tensors: LayerTensors, part: slice) -> LayerTensors:
    """Some of a layer's outputs: float64 copies take 16 times the room of 4-bit integers."""
    return LayerTensors(
        tensors.qweight[:, part].contiguous(),
        tensors.scales[:, part],
        tensors.offsets[:, part],
        tensors.g_idx,
    )


def dense(tensors: LayerTensors, spec: QuantSpec) -> torch.Tensor:
    """W^T [K, N] in float64."""
    weight = PackedWeight(tensors.qweight, tensors.scales, tensors.offsets, tensors.g_idx, spec)
    return reference.dequantize(weight, torch.float64)


def added_output(
    x: torch.Tensor,
    merge: LayerMerge,
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]],
    base: LayerTensors,
    convention: str | None,
) -> torch.Tensor:
    """x [M, K] -> what the adapter adds to y [M, N], float64.

    Args:
        x: inputs of the layer, float64.
        merge: the layer.
        matrices: A [r, columns] and B [N, r] of "zeros" and "scales".
        base: the base's tensors of the layer.
        convention: how the adapter pools; None for ours, which sums over the base's groups.
    """
    spec, scaling = merge.spec, merge.layer.scaling
    added = x.new_zeros(x.shape[0], base.scales.shape[1])
    if "zeros" in matrices:
        a, b = (matrix.double() for matrix in matrices["zeros"])
        if convention is None:
            features = reference.pool(x, base.g_idx, spec.group_size)
        else:
            features = pooled(x, convention, merge.pool_size)
        added += features @ a.t() @ b.t() * scaling
    if "scales" in matrices:
        # every weight of a group changes by the same share of itself
        a, b = (matrix.double() for matrix in matrices["scales"])
        share = (b @ a).t() * scaling
        index = group_index(base.g_idx, spec.group_size, spec.in_features, x.device)
        added += x @ (dense(base, spec) * share[index.long()])
    return added
