"""Measure what checking costs: checking.py ADAPTER BASE WORK [REPETITIONS].

Prints seconds of copying the base's files with fsync, of merging, and of loading, each with and
without the hashes of what is read, side by side. WORK is a directory with room for the base.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from qalora_plugin.files import manifest
from qalora_plugin.merge.merge import merge_adapter


def seconds(action):
    """Return how long a call takes in which no file's hash is known."""
    manifest._hashes.clear()
    started = time.monotonic()
    action()
    return round(time.monotonic() - started, 2)


def copy(base, target):
    """Copy a directory's files, each synced."""
    target.mkdir()
    for path in base.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())


def main(adapter, base, work, repetitions="3"):
    """Print one line of JSON a repetition."""
    base, target = Path(base), Path(work) / "checking"
    for _ in range(int(repetitions)):
        row = {"load": round(os.getloadavg()[0], 1), "copy": seconds(lambda: copy(base, target))}
        shutil.rmtree(target)
        row["merge"] = seconds(lambda: merge_adapter(adapter, target, base))
        shutil.rmtree(target)
        row["loading"] = seconds(lambda: AutoModelForCausalLM.from_pretrained(base))
        with manifest.unchecked_hashes():
            row["merge_unchecked"] = seconds(lambda: merge_adapter(adapter, target, base))
            shutil.rmtree(target)
            row["loading_unchecked"] = seconds(lambda: AutoModelForCausalLM.from_pretrained(base))
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
