"""Is this machine fit, and are the kernels right on it? Each check writes one row.

python checks.py machine   --device cuda --output checks.jsonl
python checks.py tests     --device cuda --output checks.jsonl      tests/kernels, fast ones
python checks.py gpu-tests --device cuda --output checks.jsonl      tests/kernels/test_cuda.py
python checks.py sanitizer --device cuda --output checks.jsonl      memcheck on awkward shapes
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import measure
import record

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["torch", "triton", "transformers", "peft", "trl", "accelerate", "datasets"]
PACKAGES += ["bitsandbytes", "gemlite", "pytest", "pytest-xdist"]
SANITIZERS = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*")


def machine(device: str) -> record.Row:
    """Versions, and on a GPU its state (read only)."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    row: record.Row = {"operator": "machine", "versions": versions, "cores": os.cpu_count()}
    if device == "cuda":
        fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
        fields += ",temperature.gpu,ecc.mode.current,compute_mode,mig.mode.current"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            row["nvidia_smi"] = done.stdout.strip() or done.stderr.strip()
        except OSError as error:
            row["nvidia_smi"] = f"not run: {error}"
    row["result"] = row.get("nvidia_smi", versions)
    return row


def _pytest(operator: str, *selection: str, workers: int = 0) -> record.Row:
    """Run tests; the row counts them, and gives reasons of skips and names of failures."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        # -P: the checkout's root has a folder `kernels`, which must not pass for a package
        command = [sys.executable, "-P", "-m", "pytest", "-q", f"--junit-xml={report}"]
        command += [
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
            "-c",
            str(ROOT / "pyproject.toml"),
        ]
        if workers and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        done = subprocess.run([*command, *selection], cwd=ROOT, check=False)
        row: record.Row = {"operator": operator, "exit_status": done.returncode}
        if not report.exists():
            return row | {"not_run": f"pytest ended with {done.returncode} and no report"}
        cases = list(ElementTree.parse(report).iter("testcase"))
    skips: Counter[str] = Counter()
    failed = []
    for case in cases:
        if (skip := case.find("skipped")) is not None:
            skips[skip.get("message", "")] += 1
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    passed = len(cases) - len(failed) - sum(skips.values())
    row |= {"passed": passed, "failed": failed, "skipped": dict(skips)}
    skipped = sum(skips.values())
    return row | {"result": f"{passed} passed, {len(failed)} failed, {skipped} skipped"}


def tests(device: str) -> record.Row:
    """The kernels' fast tests; they take the GPU where there is one."""
    if device == "cpu":  # the rehearsal: the same command on one file
        return _pytest("kernel tests", "tests/kernels/test_checks.py", "-m", "not slow")
    # compiling is most of the time: many processes share the GPU
    return _pytest("kernel tests", "tests/kernels", "-m", "not slow", workers=12)


def gpu_tests(device: str) -> record.Row:
    """What only a GPU can show, slow tests too."""
    return _pytest("GPU tests", "tests/kernels/test_cuda.py")


def find_sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit, on the PATH or where toolkits are installed."""
    if found := shutil.which("compute-sanitizer"):
        return found
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for pattern in (f"{home}/bin", *SANITIZERS):
        for place in sorted(Path("/").glob(pattern.lstrip("/"))):
            if (place / "compute-sanitizer").is_file():
                return str(place / "compute-sanitizer")
    return None


def sanitizer(device: str) -> record.Row:
    """Every operator on awkward shapes, plainly and then under memcheck (only plainly on a CPU)."""
    row: record.Row = {"operator": "memcheck"}
    script = [sys.executable, str(Path(__file__).with_name("sanitize.py")), "--device", device]
    # at the same time, since compiling is most of it; memcheck then finds everything compiled
    all_bits = ("2", "3", "4", "8") if device == "cuda" else ("3",)
    plain = [subprocess.Popen([*script, "--bits", bits]) for bits in all_bits]
    if any([process.wait() for process in plain]):
        return row | {"errors": 0, "exit_status": 1, "result": "wrong results without memcheck"}
    tool = find_sanitizer()
    if device == "cpu" or tool is None:
        reason = "no GPU" if device == "cpu" else "compute-sanitizer was not found"
        return row | {"not_run": f"{reason}; without it the results were right"}
    # Triton's compilers are processes of their own, and none of ours
    options = ["--tool", "memcheck", "--target-processes", "application-only"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [tool, *options, "--error-exitcode", "9", *script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout[-3000:])
    row |= {"exit_status": done.returncode, "output": done.stdout[-2000:]}
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout)
    if summary is None:
        return row | {"not_run": f"compute-sanitizer gave no summary, exit {done.returncode}"}
    errors = int(summary[1])
    wrong = ", and wrong results" * (done.returncode == 1)
    return row | {"errors": errors, "result": f"{errors} errors{wrong}"}


CHECKS = {"machine": machine, "tests": tests, "gpu-tests": gpu_tests, "sanitizer": sanitizer}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="data file, appended to")
    arguments = parser.parse_args()
    data = record.DataFile(arguments.output, measure.origin(arguments.device))
    data.add(CHECKS[arguments.check](arguments.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
