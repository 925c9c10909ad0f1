"""A real language model under every method: GSM8K and commonsense at 4, 3 and 2 bits.

    python recipes/study/smollm2.py MODEL_DIR
    python recipes/study/language_study.py MODEL_DIR --data DATA --bases BASES [--seconds N]

Started again it makes the rows that are missing; --seconds says when to begin no further run.
--tasks, --settings, --methods, --seeds and --middle-rate choose a part; --slice makes ten minutes
of it (2 bits, GSM8K, three methods at one rate, a third of the steps).

The learning rate of every method is swept alike (three rates, at the first setting and seed, chosen
by the validation loss); the other settings and seeds take the best. Rows are in
results/language.jsonl, each with seed, command and versions. language_report.py prints them as
tables.
"""

import importlib.metadata
import os
import resource
import statistics
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import language_tasks as tasks
import session
from language_methods import METHODS, LanguageModels
from rows import RESULTS, Row
from transformers import AutoTokenizer

import qalora_plugin
from qalora_plugin import parameter_groups

ROWS = RESULTS / "language.jsonl"
SETTINGS = ((2, 32), (3, 32), (2, 64), (4, 128))
SEEDS = (0, 1)
RATES = (0.0003, 0.001, 0.003)
PEQA_RATES = (0.003, 0.01, 0.03)  # of every scale by itself, relative
TASKS = ("gsm8k", "commonsense")
Setting = tuple[int, int | None]
"""Bits and group size."""


def rates(method: str) -> tuple[float, ...]:
    """Return the rates that are swept: as many for every method."""
    return PEQA_RATES if method == "peqa" else RATES


def _matching(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if wanted.items() <= row.items()]


def of_sizes(rows: list[Row], sizes: tasks.Sizes) -> list[Row]:
    """Return the rows of one study: those of a slice are another."""
    return _matching(rows, **asdict(sizes))


def place(method: str, setting: Setting) -> Row:
    """Return the bits and group size of a method's rows: LoRA's are of one training in 16 bits."""
    bits, group_size = (16, None) if method == "lora" else setting
    return {"method": method, "bits": bits, "group_size": group_size}


def best_rate(rows: list[Row], task: str, method: str) -> float | None:
    """Return the swept rate with the lowest validation loss."""
    swept = _matching(rows, task=task, seed=SEEDS[0], **place(method, SETTINGS[0]))
    return min(swept, key=lambda row: row["validation_loss"])["lr"] if swept else None


def wanted(rows: list[Row], task: str, methods: tuple[str, ...], arguments: Any) -> Row | None:
    """Return the next run that is missing, as the entries that tell its row from others."""
    first = SETTINGS[0]
    settings = (first, *(setting for setting in arguments.settings if setting != first))
    middle = slice(1, 2) if arguments.middle_rate else slice(None)
    seeds = (SEEDS[0], *(seed for seed in arguments.seeds if seed != SEEDS[0]))
    for setting in ((16, None), *settings):
        base = {"task": task} | place("base", setting)
        if not _matching(rows, **base):
            return base
    for setting in settings:
        for method in methods:
            run = {"task": task} | place(method, setting)
            for seed in seeds:
                sweeps = setting == first and seed == SEEDS[0]
                for rate in rates(method)[middle] if sweeps else (best_rate(rows, task, method),):
                    if not _matching(rows, **run, seed=seed, lr=rate):
                        return run | {"seed": seed, "lr": rate}
    return None


def figures(model: Any, task: tasks.LanguageTask, sizes: tasks.Sizes) -> Row:
    """Return the losses of a model, and its accuracies where there are choices."""
    batch = 2 * sizes.batch
    found = {
        "validation_loss": round(tasks.loss(model, task.validation, batch), 5),
        "test_loss": round(tasks.loss(model, task.test, batch), 5),
    }
    if task.choices:
        accuracies = tasks.accuracies(model, task, batch)
        found["accuracy"] = {name: round(value, 4) for name, value in accuracies.items()}
    return found


def make(run: Row, task: tasks.LanguageTask, context: Row, bases: Path) -> list[Row]:
    """Make one run and return its row."""
    begun, sizes, tokenizer = time.monotonic(), context["sizes"], context["tokenizer"]
    models = LanguageModels(context["source"], bases, task, sizes, context["refine_steps"])
    method, bits, group_size = run["method"], run["bits"], run["group_size"]
    row = dict(run)
    if method == "base":
        model = models.base("plain", bits, group_size)
    else:
        model = models.build(method, bits, group_size, run["seed"])
        groups = parameter_groups(model, run["lr"])
        row["parameters"] = sum(p.numel() for group in groups for p in group["params"])
        seconds = tasks.train(model, groups, task, sizes, run["seed"])
        row["step_seconds"] = round(statistics.median(seconds), 3)
        if method in ("lora", "lora+gptq", "qlora+gptq"):
            model = model.merge_and_unload()
        if method.endswith("+gptq"):
            model = models.requantized(model, bits, group_size, tokenizer)
    row |= figures(model, task, sizes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    row |= {"seconds": round(time.monotonic() - begun, 1), "process_peak_mib": peak}
    return [row | context["facts"]]


def _setting(text: str) -> Setting:
    bits, _, group_size = text.partition("g")
    return int(bits), int(group_size)


def _command(arguments: Any) -> str:
    """Return the command line, without the folders of this machine."""
    folders = ("source", "data", "bases", "rows")
    names = {str(getattr(arguments, name)): name.upper() for name in folders}
    words = [names.get(word, word) for word in sys.argv[1:]]
    return " ".join(["python recipes/study/language_study.py", *words])


def main() -> int:
    """Make the rows that are missing; return 3 if the time was up before the last."""
    parser = session.options(__doc__.splitlines()[0], ROWS)
    parser.add_argument("source", type=Path, metavar="MODEL_DIR")
    data = os.environ.get("QALORA_DATA")
    parser.add_argument("--data", type=Path, default=data, required=data is None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    about = "bits and group size, such as 2g32"
    parser.add_argument("--settings", nargs="+", type=_setting, default=SETTINGS, help=about)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    about = "leave the sweep for later: the middle one of each method's rates alone"
    parser.add_argument("--middle-rate", action="store_true", help=about)
    parser.add_argument("--slice", action="store_true", help="ten minutes of it, for CI")
    arguments = parser.parse_args()
    qalora_plugin.register()
    sizes, refine_steps = tasks.Sizes(), 250
    if arguments.slice:
        arguments.tasks, arguments.settings = ("gsm8k",), SETTINGS[:1]
        arguments.methods, arguments.seeds = ("lora+gptq", "zeros", "both"), SEEDS[:1]
        arguments.middle_rate = True
        sizes, refine_steps = replace(sizes, steps=20, validation=16, test=64), 20
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    names = ("qalora-plugin", "torch", "transformers", "peft")
    facts = asdict(sizes) | {
        "model": arguments.source.resolve().name,
        "refine_steps": refine_steps,
        "command": _command(arguments),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
    context = {
        "source": arguments.source,
        "sizes": sizes,
        "refine_steps": refine_steps,
        "tokenizer": tokenizer,
        "facts": facts,
    }
    loaded = {name: tasks.load(name, arguments.data, tokenizer, sizes) for name in arguments.tasks}

    def next_run(rows: list[Row]) -> session.Make | None:
        rows = of_sizes(rows, sizes)
        for name, task in loaded.items():
            run = wanted(rows, name, tuple(arguments.methods), arguments)
            if run is not None:
                return partial(make, run, task, context)
        return None

    return session.work(arguments, next_run)


if __name__ == "__main__":
    sys.exit(main())
