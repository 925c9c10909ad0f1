"""Memory that dequantized weights pass through, kept between calls."""

import math
import threading

import torch

_local = threading.local()


def workspace(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return uninitialised memory on the CPU, valid until this thread's next call.

    A fresh tensor of a layer's size costs more in page faults than dequantizing into it. Each
    thread keeps one buffer, as large as the largest layer that it has met.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _local.buffer = None  # free the small one first
        # a normal tensor serves inference mode too, not the other way round
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=torch.uint8)
        _local.buffer = buffer
    return buffer[:size].view(dtype).view(shape)
