"""Everything about the kernels on one GPU machine, without network, in one command.

    python kernels/benchmarks/gpu_run.py OUT_DIR                      all stages
    python kernels/benchmarks/gpu_run.py OUT_DIR --stage 2 --budget 400
    python kernels/benchmarks/gpu_run.py OUT_DIR --rehearse           on the CPU, tiny shapes

It runs the units of `gpu_units.py`, each a process of its own, with packages from wheels
(`carry.py`). Give the same command with the same OUT_DIR again and it goes on: what has finished is
not run again, what failed or did not fit into --budget is. README.md names the files in OUT_DIR.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from gpu_units import Unit, summary, units

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("usr/local/cuda*/bin", "usr/local/cuda*/compute-sanitizer", "opt/nvidia/*")
WHEELS = ROOT / ".wheels"
COMMIT_FILE = "commit.txt"


def set_up(wheels: Path, site: Path) -> None:
    """Fill `site`, to be put on PYTHONPATH, with the carried packages and this checkout's.

    Nothing of the machine's own Python is changed; torch, triton and transformers stay its own.
    """
    carried = sorted(map(str, wheels.glob("*.whl")))
    if carried:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        pip += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", str(site), *carried], check=True)
    # links, so that the root's folder `kernels` does not get onto the path with them
    (site / "qalora_plugin").symlink_to(ROOT / "qalora_plugin")
    (site / "qalora_kernels").symlink_to(ROOT / "kernels" / "qalora_kernels")


def environment(out: Path, site: Path, wheels: Path, rehearse: bool) -> dict[str, str]:
    """Return the variables of every unit."""
    commit = wheels / COMMIT_FILE
    variables = {
        "PYTHONPATH": str(site),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "QALORA_TUNING_CACHE": str(out / "tuning.json"),
        "QALORA_COMMIT": commit.read_text().strip() if commit.exists() else "unknown",
    }
    if rehearse:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | variables


def command_of(unit: Unit, out: Path, device: str) -> list[str]:
    """Return the command line of a unit."""
    kind, *arguments = shlex.split(unit.command)
    if kind == "bench":
        data = str(out / f"stage{unit.stage}.jsonl")
        bench = str(ROOT / "kernels" / "benchmarks" / "bench.py")
        return [sys.executable, bench, *arguments, "--device", device, "--output", data]
    # -P: the checkout's root has a folder `kernels`, which must not pass for a package
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    if kind == "pytest" or device == "cpu":
        return pytest
    toolkits = [str(place) for pattern in SANITIZERS for place in Path("/").glob(pattern)]
    path = ":".join([os.environ["PATH"], *toolkits])
    tool = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    # every tensor is an allocation of its own; Triton's compilers are processes, and none of ours
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", "memcheck"]
    return [*sanitizer, "--target-processes", "application-only", "--error-exitcode", "9", *pytest]


def run(unit: Unit, out: Path, device: str, variables: dict[str, str], seconds: float) -> None:
    """Run a unit for `seconds` at most, and note how it ended."""
    begin = time.monotonic()
    with (out / "log.txt").open("a+", encoding="utf-8") as log:
        log.write(f"---- {unit.name}\n")
        log.flush()
        command = command_of(unit, out, device)
        both = {"stdout": log, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **both, env=variables, cwd=ROOT, process_group=0)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with the processes that it started
            process.wait()
            status = 124
            log.write(f"stopped after {seconds:.0f} s\n")
        log.seek(0)
        last = log.read().splitlines()[-1]
    row = {"unit": unit.name, "exit_status": status, "seconds": round(time.monotonic() - begin, 1)}
    print(row, flush=True)
    measure.append(out / "units.jsonl", row | {"result": last})


def finished(out: Path) -> set[str]:
    """Return the names of the units that have finished."""
    rows = measure.read(out / "units.jsonl")
    return {row["unit"] for row in rows if row["exit_status"] == 0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="results; give the same one to go on")
    parser.add_argument("--stage", type=int, action="append", choices=[1, 2, 3, 4], help="all")
    parser.add_argument("--budget", type=float, default=780, help="seconds for this call")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="made by carry.py")
    parser.add_argument("--only", default="", help="units whose name starts so")
    parser.add_argument("--list", action="store_true", help="print the units and stop")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny shapes")
    a = parser.parse_args()
    end = time.monotonic() + a.budget
    chosen = [u for u in units(a.rehearse) if not a.stage or u.stage in a.stage]
    chosen = [unit for unit in chosen if unit.name.startswith(a.only)]
    if a.list:
        print("\n".join(f"{u.stage}  {u.name:<20} {u.limit:>4} s  {u.command}" for u in chosen))
        return 0
    out, device = a.out.resolve(), "cpu" if a.rehearse else "cuda"
    out.mkdir(parents=True, exist_ok=True)
    waiting = [unit for unit in chosen if unit.name not in finished(out)]
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qalora-site-") as site:
        set_up(a.wheels, Path(site))
        variables = environment(out, Path(site), a.wheels, a.rehearse)
        for unit in waiting:
            left = end - time.monotonic()
            if left < min(30, unit.limit):
                left_out.append(unit.name)
                continue
            run(unit, out, device, variables, min(unit.limit, left))
            # now, since this call may be cut off
            (out / "summary.txt").write_text(summary(out, a.rehearse), encoding="utf-8")
    failed = [u.name for u in chosen if u.name not in finished(out) | set(left_out)]
    text = "REHEARSAL on the CPU: these numbers say nothing about a GPU\n" * a.rehearse
    text += summary(out, a.rehearse)
    text += f"\nfailed: {failed or 'none'}\nno time left for: {left_out or 'none'}\n"
    (out / "summary.txt").write_text(text, encoding="utf-8")
    print("\n" + text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
