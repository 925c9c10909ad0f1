"""INT-n operators on the CPU. Contract: `backends`.

Many rows: compiled code dequantizes W^T into a reused workspace, then one matrix product of
torch's. A few rows: the weights are unpacked in registers and never written. What the compiled
code does not serve (fp16, no C compiler) the plain PyTorch code of `backends.torch` does.

Against plain PyTorch on two AVX-512 cores, layers from 1024 x 1024 to 4096 x 4096: dequantizing
takes 0.03 to 0.15 of the time, a product with 1 to 16 rows 0.05 to 0.7 of dequantizing and
multiplying, the scales' gradient with its matrix product 0.55 to 0.95.
"""

import torch

from ... import packing
from ...packed import PackedWeight
from .. import torch as plain
from . import native
from .workspace import workspace

FEW_ROWS = 32
"""Up to so many rows unpacking in registers wins; in bf16 it loses at twice as many."""

FEW_ROWS_WEIGHTS = 1 << 18
"""Weights from which on that pays: below, Python's own cost is the same either way."""

# torch's own reduction and matrix product leave nothing to gain
pool = plain.pool
pooled_grad = plain.pooled_grad


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    """Write W^T to `out` [K, N], with the bits that `backends.torch` computes."""
    served = native if native.dequantizes(out.dtype) else plain
    return served.dequantize(weight, out)


def _dense(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return W^T [K, N] in the workspace."""
    shape = (weight.spec.in_features, weight.spec.out_features)
    return dequantize(weight, workspace(shape, dtype))


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N]."""
    large = weight.spec.in_features * weight.spec.out_features >= FEW_ROWS_WEIGHTS
    if x.shape[0] <= FEW_ROWS and large and native.multiplies():
        return native.multiply(x, weight, bias)
    bias = None if bias is None else bias.to(x.dtype)
    return torch.nn.functional.linear(x, _dense(weight, x.dtype).t(), bias)


def grad_input(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return dy W [M, K]."""
    return dy @ _dense(weight, dy.dtype).t()


def weighted_group_grad(dy: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the sum over each group of (x^T dy) * W^T: [M, N], [M, K] -> [G, N]."""
    if not native.dequantizes(dy.dtype):
        return plain.weighted_group_grad(dy, x, weight)
    product = workspace((weight.spec.in_features, weight.spec.out_features), dy.dtype)
    torch.mm(x.t(), dy, out=product)
    return native.group_grad(product, weight)


def pack_halves(halves: torch.Tensor, out: torch.Tensor) -> None:
    """Pack uint8 [N, S, 16] into `out` int32 [4*S, N], as `packing.pack_halves` does."""
    served = native if native.packs() else packing
    served.pack_halves(halves, out)
