"""Measure what checking costs, side by side with copying: checking.py WORK [LAYERS] [REPETITIONS].

WORK is a directory with room for four times the models, which have Llama-2-7B's widths, and its 32
layers unless fewer are asked for. They are made there, or found from an earlier run:

    base, adapter    in our format: copied with fsync, merged, and loaded, with and without hashes:
                     alone, which maps the file and reads little of it, and until the first token
    model.gguf       copied with fsync, imported, and written back with the adapter of the import

Prints, of every repetition, wall seconds and CPU seconds (user and system) of each step; then, as
a comment, the medians of the ratios to copying the same bytes. results/checking.jsonl has the rows.
"""

import json
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402
from models import write_adapter, write_base, write_gguf  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qalora_plugin import export_model, merge_adapter  # noqa: E402
from qalora_plugin.checkpoint.convert import import_model  # noqa: E402
from qalora_plugin.files import digests, manifest  # noqa: E402


def seconds(action):
    """Return wall and CPU seconds of a call in which no file's hash is known."""
    digests._known.clear()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    action()
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(wall, 2), round(cpu, 2)


def copy(source, target):
    """Copy a file, or a directory's files, each synced."""
    pairs = [(source, target)]
    if source.is_dir():
        target.mkdir()
        pairs = [(path, target / path.name) for path in source.iterdir()]
    for path, new in pairs:
        shutil.copyfile(path, new)  # in the kernel: the fastest way
        with new.open("rb") as file:
            os.fsync(file.fileno())


def remove(path):
    """Remove what a step wrote."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps_of_a_base(work, layers):
    """Return the steps, {name: action}; each writes `work / "out"`, or nothing."""
    base, adapter, out = work / "base", work / "adapter", work / "out"
    if not base.exists():
        write_adapter(write_base(base, layers), adapter)

    def load():
        return AutoModelForCausalLM.from_pretrained(base)

    def first_token():
        with torch.no_grad():
            load()(torch.tensor([[1]]))

    def unchecked(action):
        with manifest.unchecked_hashes():
            action()

    return {
        "copy": lambda: copy(base, out),
        "merge": lambda: merge_adapter(adapter, out, base),
        "load": load,
        "load unchecked": lambda: unchecked(load),
        "first token": first_token,
        "first token unchecked": lambda: unchecked(first_token),
    }


def steps_of_gguf(work, layers):
    """Return the same of a GGUF file."""
    path, merged, out = work / "model.gguf", work / "gguf-merged", work / "out.gguf"
    if not merged.exists():
        if not path.exists():
            write_gguf(path, layers)
        base = import_model(path, work / "gguf-base").out
        merge_adapter(write_adapter(base, work / "gguf-adapter"), merged, base)
        remove(base)
    return {
        "copy": lambda: copy(path, out),
        "import": lambda: import_model(path, out),
        "write back": lambda: export_model(merged, out, "original"),
    }


def measure(steps, out, repetitions):
    """Print a row of each repetition, and the medians of the ratios to the first step."""
    rows = []
    for _ in range(repetitions):
        rows.append({})
        for name, action in steps.items():
            rows[-1][name] = seconds(action)
            if out.exists():
                remove(out)
        print(json.dumps({"busy": round(os.getloadavg()[0], 1), **rows[-1]}), flush=True)
    for name in list(steps)[1:]:
        if not name.endswith("unchecked"):
            other = name + " unchecked" if name + " unchecked" in steps else next(iter(steps))
            wall, cpu = ([row[name][kind] / row[other][kind] for row in rows] for kind in (0, 1))
            print(
                f"# {name} / {other}: {statistics.median(wall):.2f} of the time "
                f"({min(wall):.2f} to {max(wall):.2f}), {statistics.median(cpu):.2f} of the CPU's",
                flush=True,
            )


def main(work, layers="32", repetitions="3"):
    """Make the models, and measure."""
    work = Path(work)
    work.mkdir(exist_ok=True)
    for steps, out in ((steps_of_a_base, "out"), (steps_of_gguf, "out.gguf")):
        measure(steps(work, int(layers)), work / out, int(repetitions))


if __name__ == "__main__":
    main(*sys.argv[1:])
