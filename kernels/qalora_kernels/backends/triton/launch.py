"""Launching kernels and the memory that they share; the only file that knows about streams."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ...checks import capturing

_lock = threading.Lock()
_workspaces: dict[tuple[torch.device, int], torch.Tensor] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, which must be a tensor.

    Kernels take tensors as row-major: what is not is copied (never an output: those are made here).

    Raises:
        RuntimeError: the tensors are on the CPU and Triton's interpreter is off.
    """
    device = args[0].device
    arguments = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*arguments, **constants)
    elif isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"the triton backend got tensors on {device}: set TRITON_INTERPRET=1 before triton is "
            "first imported, or unset QALORA_BACKEND"
        )
    else:
        kernel[grid](*arguments, **constants)


@contextmanager
def workspace(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Iterator[torch.Tensor]:
    """Lend uninitialised memory, free again for the next call on the same device and stream.

    Kernels of one stream run in order, so a layer is done with it when the next one writes; the
    lock keeps another thread from launching on that stream in between. While a CUDA graph is
    captured, the memory comes from the graph's own pool instead and is not kept.
    """
    if capturing(device):
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    size = math.prod(shape) * dtype.itemsize
    with _lock:
        buffer = _workspaces.get((device, stream))
        if buffer is None or buffer.numel() < size:
            # normal tensors serve inference mode too, not the other way round
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
            _workspaces[device, stream] = buffer
        yield buffer[:size].view(dtype).view(shape)
