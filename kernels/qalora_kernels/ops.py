"""The operators, registered with torch.library, so that torch.compile and meta devices see through.

Each checks its arguments (`checks`: ValueError before any kernel runs) and forwards to the backend
that serves the device and dtype; its fake kernel states shapes and dtypes only. A `PackedWeight`
is flattened on the way through torch's dispatcher, here and nowhere else: `torch.ops.qalora.*`
take its tensors and sizes one by one. Activations are 2-D: `autograd` flattens.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import checks, packing
from .backends import get_backend
from .packed import PackedWeight
from .spec import QuantSpec, wide

_Function = Callable[..., torch.Tensor]
_LIBRARY = torch.library.Library("qalora", "DEF")
_TENSORS = "Tensor qweight, Tensor scales, Tensor offsets, Tensor? g_idx"
_WEIGHT = _TENSORS + ", int bits, int group_size, int in_features, int out_features"
_spec = functools.lru_cache(maxsize=1024)(QuantSpec)


def _operator(schema: str, fake: _Function) -> Callable[[_Function], _Function]:
    """Register a function for every device; what is returned goes through torch's dispatcher.

    It does what torch.library.custom_op does at a third of the cost a call, which a small product
    would feel: derivatives are `autograd`'s, and no operator changes or returns what it was given.

    Args:
        schema: the arguments in torch's notation, "WEIGHT" for those of a `PackedWeight`.
        fake: the fake kernel; it gets the flat arguments.
    """
    place = schema.split(", ").index("WEIGHT") if "WEIGHT" in schema else None

    def register(function: _Function) -> _Function:
        def run(*flat: Any) -> torch.Tensor:
            if place is None:
                return function(*flat)
            qweight, scales, offsets, g_idx, *rest = flat[place:]
            weight = PackedWeight(qweight, scales, offsets, g_idx, _spec(*rest[:4]))
            return function(*flat[:place], weight, *rest[4:])

        name = function.__name__
        _LIBRARY.define(f"{name}({schema.replace('WEIGHT', _WEIGHT)}) -> Tensor")
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"qalora::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.qalora, name).default

        @functools.wraps(function)
        def call(*arguments: Any) -> torch.Tensor:
            if place is not None:
                weight = arguments[place]
                arguments = (*arguments[:place], *weight.flat, *arguments[place + 1 :])
            return operator(*arguments)

        return call

    return register


@_operator(
    "WEIGHT, ScalarType dtype",
    lambda qweight, *flat: qweight.new_empty(flat[-3], flat[-2], dtype=flat[-1]),
)
def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return W^T [K, N] in `dtype`."""
    checks.packed(weight)
    checks.output_dtype(dtype)
    out = weight.qweight.new_empty(weight.spec.in_features, weight.spec.out_features, dtype=dtype)
    return get_backend(out.device, dtype).dequantize(weight, out)


@_operator(
    "Tensor x, Tensor? g_idx, int group_size",
    lambda x, g_idx, group_size: x.new_empty(x.shape[0], -(-x.shape[1] // group_size)),
)
def pool(x: torch.Tensor, g_idx: torch.Tensor | None, group_size: int) -> torch.Tensor:
    """Sum over the inputs of each group: [M, K] -> [M, G] (arXiv 2309.14717, Algorithm 1)."""
    checks.rows("x", x, x.shape[-1], x)
    checks.groups(g_idx, group_size, x.shape[1], x.device)
    return get_backend(x.device, x.dtype).pool(x, g_idx, group_size)


@_operator("Tensor x, WEIGHT, Tensor? bias", lambda x, *flat: x.new_empty(x.shape[0], flat[-2]))
def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + bias [M, N] in the dtype of x [M, K]."""
    checks.packed(weight)
    checks.rows("x", x, weight.spec.in_features, weight.qweight)
    checks.bias(bias, weight.spec.out_features, x.device)
    return get_backend(x.device, x.dtype).linear(x, weight, bias)


@_operator("Tensor dy, WEIGHT", lambda dy, *flat: dy.new_empty(dy.shape[0], flat[-2]))
def grad_input(dy: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return dy W [M, K] in the dtype of dy [M, N]."""
    checks.packed(weight)
    checks.rows("dy", dy, weight.spec.out_features, weight.qweight)
    return get_backend(dy.device, dy.dtype).grad_input(dy, weight)


@_operator(
    "Tensor dy, Tensor pooled",
    lambda dy, pooled: dy.new_empty(pooled.shape[1], dy.shape[1], dtype=wide(dy.dtype)),
)
def pooled_grad(dy: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the offsets, pool(x)^T dy: [M, N], [M, G] -> [G, N], fp32 or fp64."""
    checks.rows("dy", dy, dy.shape[-1], dy)
    checks.rows("pooled", pooled, pooled.shape[-1], dy, like_rows=True)
    return get_backend(dy.device, dy.dtype).pooled_grad(dy, pooled)


@_operator(
    "Tensor dy, Tensor x, WEIGHT",
    lambda dy, x, qweight, scales, *flat: dy.new_empty(
        scales.shape[0], dy.shape[1], dtype=wide(dy.dtype)
    ),
)
def weighted_group_grad(dy: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return the gradient of a relative change of the scales, the zero-point kept.

    It is the sum over k in group g of (x^T dy)[k, n] * W[n, k]: [M, N], [M, K] -> [G, N], fp32 or
    fp64.
    """
    checks.packed(weight)
    checks.rows("dy", dy, weight.spec.out_features, weight.qweight)
    checks.rows("x", x, weight.spec.in_features, dy, like_rows=True)
    return get_backend(dy.device, dy.dtype).weighted_group_grad(dy, x, weight)


def pack_halves(halves: torch.Tensor, out: torch.Tensor) -> None:
    """Pack 4-bit codes by the backend of their device, see `packing.pack_halves`."""
    backend = get_backend(out.device, torch.float32)
    getattr(backend, "pack_halves", packing.pack_halves)(halves, out)
