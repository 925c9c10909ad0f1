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

MIN_SAMPLE = 2e-3  # seconds; shorter calls are repeated within one sample


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
        calls[name] = max(1, math.ceil(MIN_SAMPLE / warm))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name], device))
    return times


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
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
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


def origin(device: str) -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    commit = _git("rev-parse", "--short", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no"):
        commit += "-dirty"
    row: dict[str, Any] = {
        "run": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }
    if device == "cuda":
        import triton

        row |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    return row
