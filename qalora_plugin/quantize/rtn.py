"""Data-free quantization: round to nearest on the grid with the least squared error of weights."""

import torch
from torch.nn.functional import pad

from qalora_kernels import PackedWeight

from .grid import Grid, check_weight, fit_groups, packed, round_codes

_CHUNK = 1 << 23  # weights fitted at a time: bounds the memory of the temporaries


def rtn(
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    name: str,
    integer_zeros: bool = False,
    offsets_at: str = "middle",
    search: bool = True,
) -> PackedWeight:
    """Quantize one weight matrix without calibration data.

    Args:
        weight: [N, K], any float dtype.
        bits: 2, 3, 4 or 8.
        group_size: inputs a group; the last group may be short.
        name: the layer, for messages.
        integer_zeros: restrict zero-points to integers (see `grid`).
        offsets_at: which weight of a group fp16 holds, "middle" or "minimum".
        search: False spreads the codes from the least to the greatest weight.

    Raises:
        QuantizationError: the weight is not a finite matrix within fp16's range.
    """
    check_weight(weight, name)
    n, k = weight.shape
    grid = Grid(bits, integer_zeros, offsets_at)
    groups = -(-k // group_size)
    scales = torch.empty(groups, n, device=weight.device)
    offsets = torch.empty_like(scales)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    full = groups * group_size
    counts = (torch.arange(full, device=weight.device) < k).view(groups, group_size, 1).float()
    rows = max(1, _CHUNK // full)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        # a short last group repeats its last input, which weighs nothing
        padded = pad(weight[part].float(), (0, full - k), mode="replicate")
        w = padded.t().reshape(groups, group_size, -1)
        s, o = fit_groups(w, grid, counts, search)
        fitted = round_codes(w, s.unsqueeze(1), o.unsqueeze(1), grid) + grid.mid
        codes[part] = fitted.reshape(full, -1)[:k].t().to(torch.uint8)
        scales[:, part], offsets[:, part] = s, o
    return packed(codes, scales, offsets, None, grid, group_size)
