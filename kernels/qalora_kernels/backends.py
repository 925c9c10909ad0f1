"""Which implementation serves a device: one table, one environment variable.

QALORA_BACKEND=cpu, =torch or =triton overrides the choice by device. A backend is a namespace
(module) with the functions of `Backend`; importing one touches no device.
"""

import importlib
import os
from typing import Protocol, cast

import torch

from .spec import QuantSpec

BACKENDS = {
    "cpu": "qalora_kernels.cpu",
    "torch": "qalora_kernels.torch_backend",
    "triton": "qalora_kernels.triton",
}
DEFAULTS = {"cpu": "cpu", "cuda": "triton"}
ENVIRONMENT_VARIABLE = "QALORA_BACKEND"


class Backend(Protocol):
    """What a backend implements. K inputs, N outputs, G groups, M rows (tokens)."""

    def dequantize(
        self,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """W^T [K, N] in `dtype`, computed in fp32 (fp64 for float64), rounded once."""

    def pool(self, x: torch.Tensor, g_idx: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
        """Group sums of x [M, K] -> [M, G], accumulated in fp32, in the dtype of x."""

    def linear(
        self,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        bias: torch.Tensor | None,
        spec: QuantSpec,
    ) -> torch.Tensor:
        """x [M, K] -> x W^T + bias [M, N] in the dtype of x."""

    def grad_input(
        self,
        dy: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
    ) -> torch.Tensor:
        """dy [M, N] -> dy W [M, K] in the dtype of dy."""

    def pooled_grad(self, dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """dy [M, N], pool(x) [M, G] -> (dy^T pool(x))^T = [G, N], fp32 (fp64 for float64)."""

    def weighted_group_grad(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        qweight: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
    ) -> torch.Tensor:
        """Sum over k in group g of (x^T dy)[k, n] * W[n, k] -> [G, N], fp32 (fp64 for float64)."""


def get_backend(device: torch.device | str) -> Backend:
    """Backend for a device: `DEFAULTS`, torch elsewhere, or what QALORA_BACKEND names.

    Raises:
        ValueError: QALORA_BACKEND names no backend, or one that does not serve the device.
    """
    device_type = torch.device(device).type
    name = os.environ.get(ENVIRONMENT_VARIABLE, "") or DEFAULTS.get(device_type, "torch")
    if name not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be one of {sorted(BACKENDS)} or unset, found {name!r}"
        )
    if name == "cpu" and device_type != "cpu":
        raise ValueError(f"{ENVIRONMENT_VARIABLE}=cpu got tensors on {device}; unset it")
    return cast(Backend, importlib.import_module(BACKENDS[name]))
