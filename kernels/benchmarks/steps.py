"""Whole steps, each variant in a process of its own: time, peak memory, and ratios between them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import ratio, spread

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / "integration" / "envs" / "build.py"

# variant -> the module that it needs, and the environment of integration/envs that has it
PEER_NEEDS = {
    "use_qalora": ("gptqmodel", "gptqmodel"),
    "use_qalora_fp32": ("gptqmodel", "gptqmodel"),
    "qlora_nf4": ("bitsandbytes", "axolotl"),
}
WARM_UP = 2


class Unavailable(RuntimeError):
    """A variant cannot run here; the message says why."""


def _interpreter(variant: str) -> str:
    """The python that can run a variant.

    Raises:
        Unavailable: what the variant needs is neither here nor in a built environment.
    """
    if variant not in PEER_NEEDS:
        return sys.executable
    module, environment = PEER_NEEDS[variant]
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    spec = importlib.util.spec_from_file_location("build_environment", ENVIRONMENTS)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    directory = build.environment_dir(environment)
    if not (directory / build.STAMP).exists():
        raise Unavailable(
            f"{module} is not installed here, and its environment is not built: "
            f"python integration/envs/build.py {environment}"
        )
    return str(directory / "bin" / "python")


class Worker:
    """A process that runs one variant: `step_worker.py`, or a script that talks as it does."""

    def __init__(self, variant: str, step: dict[str, Any], script: str = "step_worker.py"):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        settings = {
            "OMP_NUM_THREADS": str(step["threads"]),
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        self.process = subprocess.Popen(
            [
                _interpreter(variant),
                str(HERE / script),
                json.dumps(step | {"variant": variant}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=tempfile.gettempdir(),  # GPTQModel writes logs into the working directory
            env=os.environ | settings,
        )
        self.ready = self._read()

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            raise Unavailable(f"exit status {self.process.returncode}: {last}")
        values = json.loads(line)
        if "error" in values:
            raise Unavailable(values["error"])
        return values

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command: `step`, `memory`.

        Raises:
            Unavailable: the process has ended.
        """
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


def run(
    name: str, step: dict[str, Any], variants: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """Measure one step in all variants, interleaved.

    Args:
        name: of the step, for the rows.
        step: shapes and settings, see `step_worker.build`.
        variants: names of `step_worker.VARIANTS`.
        rounds: timed rounds.

    Yields:
        Rows: one a variant, one a ratio to "qalora", one for each variant that cannot run.
    """
    workers: dict[str, Worker] = {}
    for variant in variants:
        try:
            workers[variant] = Worker(variant, step)
        except Unavailable as reason:
            yield {"operator": name, "variant": variant, "not_run": str(reason)}
    times: dict[str, list[float]] = {variant: [] for variant in workers}
    memory: dict[str, dict[str, Any]] = {}
    for command in ["step"] * (WARM_UP + rounds) + ["memory"]:
        for variant, worker in list(workers.items()):
            try:
                answer = worker.ask(command)
            except Unavailable as reason:
                del workers[variant]
                yield {"operator": name, "variant": variant, "not_run": str(reason)}
                continue
            if command == "memory":
                memory[variant] = answer
                worker.close()
            else:
                times[variant].append(answer["seconds"])
    times = {variant: samples[WARM_UP:] for variant, samples in times.items()}
    for variant, worker in workers.items():
        yield {
            "operator": name,
            "variant": variant,
            "dtype": "bfloat16",
            "M": step["batch"] * step["sequence"],
            "step": step,
            "rounds": rounds,
            "weight_bytes": worker.ready["weight_bytes"],
            "peer_torch": worker.ready["torch"],
            **memory[variant],
            **spread(times[variant], "seconds"),
        }
    for variant in workers:
        if variant != "qalora" and "qalora" in workers:
            pair = f"qalora / {variant}"
            yield {"operator": name, "ratio": pair, **ratio(times["qalora"], times[variant])}
