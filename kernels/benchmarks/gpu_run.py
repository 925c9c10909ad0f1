"""Everything about the kernels on one GPU machine, without network, in one command.

    python kernels/benchmarks/gpu_run.py OUT_DIR                      all stages
    python kernels/benchmarks/gpu_run.py OUT_DIR --stage 2 --budget 540
    python kernels/benchmarks/gpu_run.py OUT_DIR --rehearse           on the CPU, tiny shapes

Stages: 0 set-up from wheels (`carry.py` makes the folder), 1 correctness, 2 kernels and a decoder
layer beside their peers, 3 whole-model training. Each stage is a list of units (`gpu_units.py`),
each a process of its own; what has finished is not run again, what failed or did not fit into
--budget is, when the same command is given again with the same OUT_DIR. The summary says which
bounds are met (`gpu_bounds.py`).

In OUT_DIR: stage1.jsonl, stage2.jsonl, stage3.jsonl (measurements), units.jsonl (what ran),
log.txt, tuning.json (the tuning cache), summary.txt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu_bounds
import gpu_units
from gpu_units import Unit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WHEELS = ROOT / ".wheels"
COMMIT_FILE = "commit.txt"


def set_up(wheels: Path, site: Path) -> str:
    """Stage 0: make `site`, to be put on PYTHONPATH: the carried packages and this checkout's.

    Nothing of the machine's own Python is changed; torch, triton and transformers stay its own.

    Returns:
        What was done, for the log.
    """
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    carried = sorted(wheels.glob("*.whl"))
    if carried:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        pip += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*pip, "--target", str(site), *map(str, carried)], check=True)
    # links, so that the root's folder `kernels` does not get onto the path with them
    (site / "qalora_plugin").symlink_to(ROOT / "qalora_plugin")
    (site / "qalora_kernels").symlink_to(ROOT / "kernels" / "qalora_kernels")
    return f"set-up: {len(carried)} wheels from {wheels.name}: {[p.name for p in carried]}"


def environment(out: Path, site: Path, wheels: Path, rehearse: bool) -> dict[str, str]:
    """Variables of every unit."""
    commit = wheels / COMMIT_FILE
    variables = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "QALORA_TUNING_CACHE": str(out / "tuning.json"),
        "QALORA_COMMIT": commit.read_text().strip() if commit.exists() else "unknown",
    }
    if rehearse:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return variables


class Log:
    """What ran: a line for people, and one for the next run."""

    def __init__(self, out: Path):
        self.text = out / "log.txt"
        self.units = out / "units.jsonl"

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.text.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def done(self) -> set[str]:
        """Names of the units that have finished."""
        if not self.units.exists():
            return set()
        rows = map(json.loads, self.units.read_text(encoding="utf-8").splitlines())
        return {row["unit"] for row in rows if row["exit_status"] == 0}

    def note(self, unit: Unit, status: int | str, seconds: float) -> None:
        row = {"unit": unit.name, "exit_status": status, "seconds": round(seconds, 1)}
        with self.units.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def run_together(
    units: list[Unit], out: Path, device: str, variables: dict[str, str], seconds: float, log: Log
) -> None:
    """Run units at the same time, each until its limit or until `seconds` are over."""
    running = []
    begin = time.monotonic()
    for unit in units:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        script, *arguments = unit.command
        data = str(out / f"stage{unit.stage}.jsonl")
        command = [sys.executable, str(HERE / script), *arguments]
        process = subprocess.Popen(
            [*command, "--device", device, "--output", data],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        running.append((unit, process, output))
    for unit, process, output in running:
        status: int | str
        left = begin + min(unit.limit, seconds) - time.monotonic()
        try:
            status = process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with the processes that it started
            process.wait()
            status = f"stopped after {min(unit.limit, seconds):.0f} s"
        output.seek(0)
        log.say(f"---- {unit.name}\n{output.read()[-20000:].rstrip()}")
        output.close()
        took = time.monotonic() - begin
        log.say(f"---- {unit.name}: {'done' if status == 0 else status} after {took:.1f} s")
        log.note(unit, status, took)


def run_units(
    units: list[Unit], out: Path, device: str, variables: dict[str, str], budget: float, log: Log
) -> list[str]:
    """Run what has not finished yet.

    Returns:
        Names of units for which no time was left.
    """
    end = time.monotonic() + budget
    finished = log.done()
    waiting = [unit for unit in units if unit.name not in finished]
    left_out = []
    groups = itertools.groupby(waiting, key=lambda unit: unit.together or unit.name)
    for group in (list(members) for _, members in groups):
        left = end - time.monotonic()
        if left < min(30, group[0].limit):
            left_out += [unit.name for unit in group]
            continue
        run_together(group, out, device, variables, left, log)
    return left_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="results; give the same one to go on")
    parser.add_argument("--stage", type=int, action="append", choices=[1, 2, 3], help="all")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for this call")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="made by carry.py")
    parser.add_argument("--only", default="", help="units whose name starts so")
    parser.add_argument("--list", action="store_true", help="print the units and stop")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny shapes")
    arguments = parser.parse_args()
    begin = time.monotonic()
    units = gpu_units.for_rehearsal() if arguments.rehearse else gpu_units.for_gpu()
    stages = arguments.stage or [1, 2, 3]
    units = [u for u in units if u.stage in stages and u.name.startswith(arguments.only)]
    if arguments.list:
        print("\n".join(f"{u.stage}  {u.name:<40} {u.limit:>4} s at most" for u in units))
        return 0
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out)
    device = "cpu" if arguments.rehearse else "cuda"
    with tempfile.TemporaryDirectory(prefix="qalora-site-") as scratch:
        site = Path(scratch) / "site"
        log.say(set_up(arguments.wheels.resolve(), site))
        variables = environment(out, site, arguments.wheels, arguments.rehearse)
        left = arguments.budget - (time.monotonic() - begin)
        left_out = run_units(units, out, device, variables, left, log)
    summary = gpu_bounds.summary(out)
    if arguments.rehearse:
        summary = "REHEARSAL on the CPU: these numbers say nothing about a GPU\n" + summary
    failed = sorted({u.name for u in units} - log.done() - set(left_out))
    summary += f"\nfailed: {failed or 'none'}\nno time left for: {left_out or 'none'}\n"
    (out / "summary.txt").write_text(summary, encoding="utf-8")
    print("\n" + summary)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
