"""Data-free quantization: round to nearest on the grid with the least squared error of weights."""

import torch
from torch.nn.functional import pad

from qalora_kernels import PackedWeight, QuantSpec

from .grid import Grid, ZeroPoints, check_weight, fit_groups, round_codes

_CHUNK = 1 << 23  # weights fitted at a time: bounds the memory of the temporaries


def rtn(
    weight: torch.Tensor,
    spec: QuantSpec,
    *,
    name: str,
    zero_points: ZeroPoints = "real",
    search: bool = True,
) -> PackedWeight:
    """Quantize one weight matrix without calibration data.

    Args:
        weight: [N, K], any float dtype.
        spec: the grid, which the result carries.
        name: the layer, for messages.
        zero_points: what they may be (see `grid`).
        search: False spreads the codes from the least to the greatest weight.

    Returns:
        Scales and offsets in fp32, each a value that the spec's stored dtypes hold.

    Raises:
        QuantizationError: the weight is not a finite matrix within fp16's range.
    """
    check_weight(weight, name)
    n, k = weight.shape
    grid, group_size, groups = Grid.of(spec, zero_points), spec.group_size, spec.num_groups
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
    return PackedWeight.from_codes(codes, scales, offsets, None, spec)
