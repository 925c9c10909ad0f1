"""A fingerprint of a base's integers: an adapter is only right on the integers it was trained on.

Two order-sensitive int64 sums (modulo 2^64) a layer, hashed with the layer's name and shape: the
same number on every device, in one pass, without a copy of the whole tensor.
"""

import hashlib
from collections.abc import Iterable

import torch

_CHUNK = 1 << 22
_PRIME = 65521


def _checksum(words: torch.Tensor) -> tuple[int, int]:
    plain = weighted = 0
    flat = words.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].to(torch.int64)
        position = torch.arange(start, start + part.numel(), device=part.device)
        plain += int(part.sum())
        weighted += int((part * (position % _PRIME + 1)).sum())
    return plain % (1 << 64), weighted % (1 << 64)


def fingerprint(layers: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the fingerprint of quantized layers, whatever their order: 32 hexadecimal digits.

    Args:
        layers: (module name in the base model, `qweight` int32 [ceil(K/32)*bits, N]).
    """
    return combine(mark(name, qweight) for name, qweight in layers)


def mark(name: str, qweight: torch.Tensor) -> str:
    """Return one layer's part of a fingerprint, for layers that are not in memory together."""
    plain, weighted = _checksum(qweight)
    return f"{name} {tuple(qweight.shape)} {plain} {weighted}"


def combine(marks: Iterable[str]) -> str:
    """Return the fingerprint of layers from their marks."""
    return hashlib.sha256("\n".join(sorted(marks)).encode()).hexdigest()[:32]
