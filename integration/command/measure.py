"""Measure how long the `qalora` command takes to answer.

    python integration/command/measure.py [MODEL...]     -> results/start.json

Each `--help`, and `inspect` of the given models, is started RUNS times from its own process, and
once before, so that files are in memory. The medians of the wall-clock times and of the processor
times (user and system) count: the latter say what the command costs where other programs run.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from qalora_plugin.cli import COMMANDS

RESULTS = Path(__file__).parent / "results" / "start.json"
RUNS = 7
START = "import sys; from qalora_command import main; sys.exit(main())"


def processor():
    """Return the processor time of all programs that have ended so far, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(arguments):
    """Return the median times of one command, in seconds: {"wall": ..., "processor": ...}."""
    wall, own = [], []
    for _ in range(RUNS + 1):
        begin, used = time.perf_counter(), processor()
        command = [sys.executable, "-c", START, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall.append(time.perf_counter() - begin)
        own.append(processor() - used)
    medians = {"wall": wall, "processor": own}
    return {name: round(statistics.median(times[1:]), 3) for name, times in medians.items()}


def main():
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    models = parser.parse_args().models
    found = {"--help": seconds(["--help"])}
    found |= {f"{name} --help": seconds([name, "--help"]) for name in COMMANDS}
    for path in models:
        size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        for more in ([], ["--quick"]):
            line = " ".join(["inspect", path.name, *more])
            found[f"{line} ({size / 1e6:.0f} MB)"] = seconds(["inspect", str(path), *more])
    for line, taken in found.items():
        print(f"{taken['wall']:6.3f} s, processor {taken['processor']:6.3f} s  qalora {line}")
    result = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "seconds": found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
