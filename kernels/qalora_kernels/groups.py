"""Groups of inputs: the index of each input's group, and sums over groups."""

import torch


def group_index(
    g_idx: torch.Tensor | None, group_size: int, in_features: int, device: torch.device
) -> torch.Tensor:
    """Return the group of every input, int [K]: `g_idx`, or k // group_size where it is None."""
    if g_idx is not None:
        return g_idx
    return torch.arange(in_features, device=device) // group_size


def expand(
    per_group: torch.Tensor, g_idx: torch.Tensor | None, group_size: int, in_features: int
) -> torch.Tensor:
    """Give every input the row of its group: [G, N] -> [K, N]."""
    if g_idx is not None:
        return per_group.index_select(0, g_idx)
    return per_group.repeat_interleave(group_size, dim=0)[:in_features]


def sum_groups(values: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Sum over the inputs of each group: [..., K] -> [..., G], in the dtype of `values`.

    The paper's sum pooling (arXiv 2309.14717, Algorithm 1: `QA(x) * (D_in // L)`, an average
    times the group size). A short last group sums what it has.
    """
    k = values.shape[-1]
    num_groups = -(-k // group_size)
    if g_idx is None and k == num_groups * group_size:
        return values.unflatten(-1, (num_groups, group_size)).sum(-1)
    index = group_index(g_idx, group_size, k, values.device).long()
    out = values.new_zeros(*values.shape[:-1], num_groups)
    return out.index_add(-1, index, values)
