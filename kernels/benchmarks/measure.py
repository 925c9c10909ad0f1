"""Timing, the machine's own limits, and what a row of the data file says about its origin."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

# seconds; shorter calls are repeated within one sample (on a GPU, so that Python runs ahead)
MIN_SAMPLE = {"cpu": 2e-3, "cuda": 4e-2}
WARM_UP = 0.1  # seconds of each comparison on a GPU: an idle one has its clocks down


def _seconds(function: Callable[[], Any], calls: int, device: str) -> float:
    """Mean time of a call."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def interleave(
    functions: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Time every function once a round, in turn, so that a busy moment of the machine hits all.

    Returns:
        name -> seconds of a call in each round.
    """
    calls = {}
    for name, function in functions.items():
        function()
        warm = min(_seconds(function, 1, device) for _ in range(2))
        calls[name] = max(1, math.ceil(MIN_SAMPLE[device] / warm))
    begin = time.perf_counter()
    while device == "cuda" and time.perf_counter() - begin < WARM_UP:
        for name, function in functions.items():
            _seconds(function, calls[name], device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name], device))
    return times


def graphed(function: Callable[[], Any], calls: int, device: str) -> Callable[[], None]:
    """A function that makes `calls` calls: on a GPU as one replay of a CUDA graph, so that the time
    is the kernels' and not Python's. What `function` has to compile or tune, it does here, before
    the capture.

    Raises:
        RuntimeError: the function cannot be captured.
    """
    if device != "cuda":

        def repeat() -> None:
            for _ in range(calls):
                function()

        return repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


def first_line(error: BaseException) -> str:
    """Kind and first line of an exception: why a peer did not run."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def spread(samples: list[float], prefix: str) -> dict[str, float]:
    """Median, quartiles and extremes, to 4 digits."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    values = {
        "median": statistics.median(samples),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "min": min(samples),
        "max": max(samples),
    }
    return {f"{prefix}_{name}": float(f"{value:.4g}") for name, value in values.items()}


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Spread of slow / fast, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)], "ratio")


def limits(device: str) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and bf16 matrix-product rate (flop/s)."""
    size = 1 << (30 if device == "cuda" else 28)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    functions = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
    times = interleave(functions, 7, device)
    return {
        "copy_bytes_per_s": 2 * size / min(times["copy"]),
        "gemm_flop_per_s": 2 * n**3 / min(times["gemm"]),
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """Commit of this checkout; where there is no git, what QALORA_COMMIT says."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        dirty = bool(name) and _git("status", "--porcelain", "--untracked-files=no") != ""
    except OSError:
        name, dirty = "", False
    if not name:
        return os.environ.get("QALORA_COMMIT", "unknown")
    return name + "-dirty" * dirty


def origin(device: str) -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    row: dict[str, Any] = {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "torch": torch.__version__,
        "commit": commit(),
    }
    if device == "cuda":
        import triton

        row |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "python": platform.python_version(),
        }
    return row
