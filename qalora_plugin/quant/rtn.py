"""Data-free quantization: round to nearest on the grid with the least squared error of weights."""

import torch
from torch.nn.functional import pad

from .grid import Grid, QuantizedWeight, check_weight, fit_groups, round_codes


def rtn(weight: torch.Tensor, *, bits: int, group_size: int, name: str) -> QuantizedWeight:
    """Quantize one weight matrix without calibration data.

    Args:
        weight: [N, K], any float dtype.
        bits: 2, 3, 4 or 8.
        group_size: inputs a group; the last group may be short.
        name: the layer, for messages.

    Raises:
        QuantizationError: the weight is not a finite matrix within fp16's range.
    """
    check_weight(weight, name)
    n, k = weight.shape
    grid = Grid(bits)
    w = weight.float().t()
    groups = -(-k // group_size)
    full = groups * group_size
    counts = (torch.arange(full, device=w.device) < k).view(groups, group_size, 1).float()
    # a short last group repeats its last input, which weighs nothing
    w = pad(w.t(), (0, full - k), mode="replicate").t() if full > k else w
    w = w.reshape(groups, group_size, n)
    scales, offsets = fit_groups(w, grid, counts)
    codes = round_codes(w, scales.unsqueeze(1), offsets.unsqueeze(1), grid) + grid.mid
    codes = codes.reshape(full, n)[:k].t().to(torch.uint8).contiguous()
    return QuantizedWeight(codes, scales, offsets, None, bits, group_size)
