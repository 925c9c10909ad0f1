"""A fingerprint of a base's integers: an adapter is only right on the integers it was trained on.

Two order-sensitive int64 sums (modulo 2^64) a layer, hashed with the layer's name and shape: the
same number on every device, in one pass, without a copy of the whole tensor.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

_PRIME = 65521
_ROWS = 64  # of _PRIME words, at a time


def _checksum(words: torch.Tensor) -> tuple[int, int]:
    """Return the sum of the words, and of each times its place modulo _PRIME, plus 1."""
    plain = weighted = 0
    flat: Any = words.reshape(-1)
    places: Any = torch.arange(1, _PRIME + 1, device=words.device)
    if words.device.type == "cpu":
        # numpy widens in the cache, six times as fast, and waits for no thread whose core is taken
        flat, places = flat.numpy(), places.numpy()
    for start in range(0, words.numel(), _PRIME * _ROWS):
        part = flat[start : start + _PRIME * _ROWS]
        rows, rest = len(part) // _PRIME, len(part) % _PRIME
        sums = _column_sums(part[: rows * _PRIME].reshape(rows, _PRIME))
        sums[:rest] += part[rows * _PRIME :]
        plain += int(sums.sum())
        weighted += int((sums * places).sum())
    return plain % (1 << 64), weighted % (1 << 64)


def _column_sums(words: Any) -> Any:
    if isinstance(words, np.ndarray):
        return np.add.reduce(words, axis=0, dtype=np.int64)
    return words.sum(0, dtype=torch.int64)


def fingerprint(layers: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the fingerprint of quantized layers, whatever their order: 32 hexadecimal digits.

    Args:
        layers: (module name in the base model, `qweight` int32 [ceil(K/32)*bits, N]).
    """
    return combine(mark(name, qweight) for name, qweight in layers)


def mark(name: str, qweight: torch.Tensor) -> str:
    """Return one layer's part of a fingerprint, for layers that are not in memory together."""
    return f"{name} {summary(qweight)}"


def summary(qweight: torch.Tensor) -> str:
    """Return what a fingerprint says about one layer's integers, whatever the layer is called."""
    plain, weighted = _checksum(qweight)
    return f"{tuple(qweight.shape)} {plain} {weighted}"


def fingerprints(
    summaries: Mapping[str, str], *names: Callable[[str], str] | Mapping[str, str]
) -> list[str]:
    """Return the fingerprints of layers under several namings, for the same integers.

    A base and the model that is trained on it may call a layer by two names.

    Args:
        summaries: of each layer, by any name.
        names: each gives the name in one naming.
    """
    found = []
    for naming in names:
        rename = naming.__getitem__ if isinstance(naming, Mapping) else naming
        found.append(combine(f"{rename(name)} {text}" for name, text in summaries.items()))
    return found


def combine(marks: Iterable[str]) -> str:
    """Return the fingerprint of layers from their marks."""
    return hashlib.sha256("\n".join(sorted(marks)).encode()).hexdigest()[:32]
