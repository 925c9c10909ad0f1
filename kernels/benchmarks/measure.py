"""Time functions, say what machine ran them, and append the rows to a data file."""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Functions = dict[str, Callable[[], Any]]
Times = dict[str, list[float]]

# seconds; shorter calls are repeated within one sample (on a GPU, so that Python runs ahead)
MIN_SAMPLE = {"cpu": 2e-3, "cuda": 4e-2}
WARM_UP = 0.1  # seconds of each comparison on a GPU: an idle one has its clocks down
PEERS = ("transformers", "peft", "trl", "accelerate", "bitsandbytes", "gemlite")


# ---- time


def _seconds(function: Callable[[], Any], calls: int, device: str) -> float:
    """Return the mean time of a call."""
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


def interleave(functions: Functions, rounds: int, device: str) -> Times:
    """Return the seconds of a call in each round.

    Every function is timed once a round, in turn, so that a busy moment of the machine hits all.
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
    times: Times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_seconds(function, calls[name], device))
    return times


def graphed(function: Callable[[], Any], calls: int, device: str) -> Callable[[], None]:
    """Return a function that makes `calls` calls, on a GPU as one replay of a CUDA graph.

    The time is then the kernels' and not Python's; `function` compiles and tunes before. Where it
    cannot be captured, torch raises.
    """

    def repeat() -> None:
        for _ in range(calls):
            function()

    if device != "cuda":
        return repeat
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeat()
    return graph.replay


def limits(device: str) -> dict[str, float]:
    """Measure the copy bandwidth (bytes read and written) and the rate of a bf16 product."""
    size = 1 << (30 if device == "cuda" else 28)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = interleave({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, 7, device)
    return {
        "copy_bytes_per_s": 2 * size / min(times["copy"]),
        "gemm_flop_per_s": 2 * n**3 / min(times["gemm"]),
    }


# ---- rows


def first_line(error: BaseException) -> str:
    """Return the kind and first line of an exception: why a variant did not run."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def spread(samples: list[float], prefix: str) -> dict[str, float]:
    """Return the median, quartiles and extremes, to 4 digits."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    median = statistics.median(samples)
    values = [median, quartiles[0], quartiles[2], min(samples), max(samples)]
    names = ("median", "q1", "q3", "min", "max")
    return {f"{prefix}_{n}": float(f"{v:.4g}") for n, v in zip(names, values, strict=True)}


def rows_of(base: Row, times: Times, more: dict[str, Row]) -> Iterator[Row]:
    """Yield a row of each variant, with what `more` says of it, then `ratios`."""
    for name, samples in times.items():
        yield base | {"variant": name} | more[name] | spread(samples, "seconds")
    yield from ratios(base, times)


def ratios(base: Row, times: Times) -> Iterator[Row]:
    """Yield the spread of each ratio "qalora / variant", taken round by round."""
    for name, samples in times.items():
        if name != "qalora" and "qalora" in times:
            pairs = zip(times["qalora"], samples, strict=True)
            yield base | {"ratio": f"qalora / {name}"} | spread([a / b for a, b in pairs], "ratio")


# ---- the machine


def _output_of(*command: str) -> str:
    """Return what a program prints, or "" where there is no such program or it fails."""
    status, text = subprocess.getstatusoutput(shlex.join(command))
    return text if status == 0 else ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{[*names, platform.machine()][0]}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Return the commit of this checkout; where there is no git, what QALORA_COMMIT says."""
    git = ("git", "-C", str(Path(__file__).parent))
    name = _output_of(*git, "rev-parse", "--short", "HEAD")
    if not name:
        return os.environ.get("QALORA_COMMIT", "unknown")
    return name + "-dirty" * bool(_output_of(*git, "status", "--porcelain", "-uno"))


def origin(device: str) -> Row:
    """Return the machine, versions and commit of this run."""
    row: Row = {
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

        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
        row |= {"driver": _output_of(*query), "cuda": torch.version.cuda}
        row |= {"triton": triton.__version__, "python": platform.python_version()}
        row["peers"] = {name: installed.get(name, "missing") for name in PEERS}
    return row


class DataFile:
    """A file of JSON lines that rows are appended to, each with the machine that it comes from."""

    def __init__(self, path: Path, device: str, more: Row | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.origin = origin(device) | (more or {})

    def add(self, row: Row) -> None:
        """Print a row and write it."""
        print(json.dumps(row), flush=True)
        append(self.path, self.origin | row)


def append(path: Path, row: Row) -> None:
    """Append a row to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Return all rows of a file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
