"""Backends: the functions that each one implements, and the choice by device and dtype.

QALORA_BACKEND=cpu, =torch or =triton overrides the choice by device. A backend is a module with
these functions (K inputs, N outputs, G groups, M rows); importing one touches no device.

    dequantize(weight, out)              write W^T to out [K, N], computed in fp32 (fp64 for
                                         float64), rounded once to its dtype; return it
    pool(x, g_idx, group_size)           group sums of x [M, K], accumulated in fp32 -> [M, G]
    linear(x, weight, bias)              x W^T + bias, in the dtype of x -> [M, N]
    grad_input(dy, weight)               dy [M, N] -> dy W [M, K]
    pooled_grad(dy, pooled)              pool(x)^T dy -> [G, N], fp32 (fp64 for float64)
    weighted_group_grad(dy, x, weight)   sum over k in group g of (x^T dy)[k, n] * W[n, k],
                                         fp32 (fp64 for float64) -> [G, N]
    pack_halves(halves, out)             see `packing`, whose own serves where a backend has none
"""

import functools
import importlib
import os
from types import ModuleType

import torch as _torch  # `torch` is a module of this package

BACKENDS = ("cpu", "torch", "triton")
DEFAULTS = {"cpu": "cpu", "cuda": "triton"}
ENVIRONMENT_VARIABLE = "QALORA_BACKEND"


def get_backend(device: _torch.device | str, dtype: _torch.dtype) -> ModuleType:
    """Return the backend for a device and the dtype of activations (or of dequantized weights).

    It is that of `DEFAULTS`, plain PyTorch elsewhere, or what QALORA_BACKEND names; float64, which
    serves exact checks, is always plain PyTorch's.

    Raises:
        ValueError: QALORA_BACKEND names no backend, or one that does not serve the device.
    """
    device = device if isinstance(device, _torch.device) else _torch.device(device)
    return _chosen(os.environ.get(ENVIRONMENT_VARIABLE, ""), device.type, dtype)


@functools.cache
def _chosen(wish: str, device_type: str, dtype: _torch.dtype) -> ModuleType:
    name = wish or DEFAULTS.get(device_type, "torch")
    if name not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be one of {sorted(BACKENDS)} or unset, found {name!r}"
        )
    if name == "cpu" and device_type != "cpu":
        raise ValueError(f"{ENVIRONMENT_VARIABLE}=cpu got tensors on {device_type}; unset it")
    return _load("torch" if dtype == _torch.float64 else name)


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
