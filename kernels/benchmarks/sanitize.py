"""Every Triton operator on awkward shapes, checked against the dense formula.

    compute-sanitizer --tool memcheck python sanitize.py --device cuda

Shapes that are multiples of nothing, groups that are short or shuffled, one row to many. With
PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is an allocation of its own, so that memcheck sees a
read or write one element outside. Exits with 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from types import ModuleType

os.environ.setdefault("QALORA_TUNING_CACHE", "off")

import torch

from qalora_kernels import PackedWeight, QuantSpec, pack, reference

# K, N, group_size, shuffled groups
LAYERS = [(172, 37, 32, False), (172, 41, 24, True), (1, 1, 1, False), (33, 129, 33, False)]
ROWS = (1, 17, 65)  # the vector product, a fused one, the library's


def layer(spec: QuantSpec, shuffled: bool, device: str) -> PackedWeight:
    """Return a weight of random numbers."""
    k, n = spec.in_features, spec.out_features
    codes = torch.randint(0, 1 << spec.bits, (k, n))
    grid = (spec.num_groups, n)
    scales = (torch.rand(grid) * 0.1 / (1 << spec.bits) + 0.01).half().float().to(device)
    offsets = (torch.randn(grid) * 0.05).half().float().to(device)
    g_idx = (torch.randperm(k) // spec.group_size).int().to(device) if shuffled else None
    return PackedWeight(pack(codes, spec.bits).to(device), scales, offsets, g_idx, spec)


def errors(
    backend: ModuleType, spec: QuantSpec, shuffled: bool, rows: int, dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Relative error of each operator against float64."""
    weight = layer(spec, shuffled, device)
    g_idx = weight.g_idx
    k, n = spec.in_features, spec.out_features
    x, dy = (torch.randn(rows, width, device=device).to(dtype) for width in (k, n))
    dense = reference.dequantize(weight, torch.float64)
    group = torch.arange(k, device=device) // spec.group_size if g_idx is None else g_idx.long()
    pooled = x.new_zeros(rows, spec.num_groups, dtype=torch.float64)
    pooled.index_add_(1, group, x.double())
    by_group = torch.zeros(spec.num_groups, n, dtype=torch.float64, device=device)
    by_group.index_add_(0, group, (x.double().t() @ dy.double()) * dense)
    ours_pooled = backend.pool(x, g_idx, spec.group_size)
    results = {
        "dequantize": (backend.dequantize(weight, torch.empty_like(dense, dtype=dtype)), dense),
        "linear": (backend.linear(x, weight, None), x.double() @ dense),
        "grad_input": (backend.grad_input(dy, weight), dy.double() @ dense.t()),
        "pool": (ours_pooled, pooled),
        "pooled_grad": (
            backend.pooled_grad(dy, ours_pooled),
            ours_pooled.double().t() @ dy.double(),
        ),
        "weighted_group_grad": (backend.weighted_group_grad(dy, x, weight), by_group),
    }
    return {
        name: ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()
        for name, (ours, exact) in results.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    arguments = parser.parse_args()
    from qalora_kernels.backends import triton as backend

    # Triton's interpreter multiplies bf16 wrongly
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float16
    worst: dict[str, float] = {}
    torch.manual_seed(0)
    for bits, (k, n, group_size, shuffled), rows in itertools.product(arguments.bits, LAYERS, ROWS):
        spec = QuantSpec(bits, group_size, k, n)
        for name, error in errors(backend, spec, shuffled, rows, dtype, arguments.device).items():
            if not error < 2e-2:
                print(f"WRONG {name} {spec} rows={rows}: relative error {error:.3g}")
                return 1
            worst[name] = max(worst.get(name, 0.0), error)
    print("largest relative errors:", {name: f"{error:.2g}" for name, error in worst.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
