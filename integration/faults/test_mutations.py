"""Damaged headers, indexes, configs and metadata end in an error of ours, or are taken.

A case is the number of its generator. 50 by default; `make faults` makes 100 for each fault. Each
runs our command in this process's child: no raw error, at most 10 CPU seconds, and a memory of
twice the files' size and 200 MB.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path

from support.gguf_files import write_gguf
from support.random_adapter import random_adapter

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.cli import main
from qalora_plugin.files.names import MANIFEST_FILE
from qalora_plugin.formats.export import export_model

from .conftest import FULL, STOCK, TIMES
from .mutations import mutated
from .processes import FORK, remove

CASES = 100 * TIMES if FULL else 50
BATCH = 250  # cases of one process
SECONDS = 10  # of CPU
MEMORY = 200_000_000
SEED = int(os.environ.get("QALORA_SEED", "0"))
FIXTURES = STOCK.parent
DAMAGED = (".json", ".safetensors", ".gguf", ".md")


class _TooLong(BaseException):
    """A case has used up its time; no handler of ours catches it."""


def _subjects(folder):
    """What is damaged, by name: (path, commands; "{}" stands for the damaged copy, "<" for output).

    All models are of the tests' own sizes, some kilobytes.
    """
    base = import_model(STOCK, folder / "base").out
    (base / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# base\n")
    adapter = random_adapter(open_quantized(base), folder / "adapter", "scales")
    merged = merge_adapter(adapter, folder / "merged", base).out
    gguf = write_gguf(folder / "model.gguf")
    given = {
        "base": (
            base,
            ["inspect {}", "merge {adapter} --base {} --out <", "plan {}"],
        ),
        "adapter": (
            adapter,
            ["inspect {}", "merge {} --base {base} --out <", "verify {merged} --adapter {}"],
        ),
        "merged": (
            merged,
            [
                "inspect {}",
                "verify {} --adapter {adapter} --base {base}",
                *(f"export {{}} --format {f} --out <" for f in ("torchao", "mlx", "gptq")),
                "push {} o/n --dry-run",
            ],
        ),
        "gguf": (gguf, ["inspect {}", "import {} --out <"]),
    }
    for format in ("torchao", "mlx", "gptq", "compressed-tensors"):
        out = export_model(merged, folder / format, format).out
        given[format] = (out, ["inspect {}", "push {} o/n --dry-run"])
        if format not in ("torchao", "mlx"):  # whose libraries are not here
            given[format][1].append("verify {} --against {merged} --no-run")
    for name in ("awq_4bit_g32_asym", "ct_8bit_channel_asym", "autoround_3bit_g32_sym"):
        given[name] = (FIXTURES / name, ["inspect {}", "import {} --out <"])
    for name in ("mlx_4bit_g32_bf16_mixed", "gptq_4bit_g32_sym_actorder"):
        given[name] = (FIXTURES / name, ["inspect {}", "import {} --out <"])
    return given


class _Runner:
    """Runs cases in this process, and writes a line before and after each."""

    def __init__(self, subjects, folder):
        self._subjects, self._folder = subjects, folder
        self._places = {name: str(path) for name, (path, _) in subjects.items()}

    def command(self, name, command, damaged):
        """Run a command of ours; return what became of it."""
        out = self._folder / "out" / ("o.gguf" if "gguf" in command.split() else "o")
        out.parent.mkdir(exist_ok=True)
        words = [word.replace("{}", str(damaged)) for word in command.split()]
        words = [str(out) if word == "<" else word.format(**self._places) for word in words]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                status = main(words)
        except SystemExit as exit:
            status = exit.code
        left = sorted(path.name for path in out.parent.iterdir() if path != out)
        remove(out.parent)
        if left:
            return f"LEFT {left} after {words}"
        if "\x1b" in printed.getvalue():
            return f"ESCAPE in what {words} prints"
        return {0: "taken", 1: "refused"}.get(status, f"status {status}")

    def case(self, number):
        """Damage a file as this number says, and give it to a command; return what became of it."""
        draw = random.Random(f"{SEED} {number}")
        name = list(self._subjects)[number % len(self._subjects)]
        path, commands = self._subjects[name]
        damaged = self._folder / "damaged" / path.name
        remove(damaged.parent)
        damaged.parent.mkdir()
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, damaged)
        files = sorted(p for p in damaged.rglob("*") if p.is_file()) or [damaged]
        chosen = draw.choice(
            [f for f in files if f.suffix in (".json", ".safetensors", ".gguf", ".md")]
        )
        keeps = damaged.is_file() or chosen.name == MANIFEST_FILE or draw.random() < 0.15
        if not keeps:  # it would find all of it
            (damaged / MANIFEST_FILE).unlink(missing_ok=True)
        chosen.write_bytes(mutated(chosen.read_bytes(), chosen.name, draw))
        command = draw.choice(commands)
        before, size = _status("VmRSS"), sum(file.stat().st_size for file in files if file.exists())
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        _limit(SECONDS)
        try:
            found = self.command(name, command, damaged)
        except _TooLong:
            found = "TOO LONG"
        except BaseException as error:
            last = "".join(traceback.format_exception(error)[-4:])
            found = f"RAW {type(error).__name__}: {error}\n{last}"
        finally:
            _limit(0)
        used = _status("VmHWM") - before
        if used > MEMORY + 2 * size:
            found = f"MEMORY {used / 1e6:.0f} MB ({found})"
        where = f"{name}/{chosen.name}: {command}"
        return found if found in ("taken", "refused") else f"case {number}, {where}: {found}"

    def batch(self, numbers, log):
        """Run cases, and write what became of them, as JSON, a line each."""
        with log.open("a") as lines:
            for number in numbers:
                print(f"start {number}", file=lines, flush=True)
                print(json.dumps(self.case(number)), file=lines, flush=True)


def _status(key):
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(key)


def _limit(seconds):
    """Raise `_TooLong` after so many CPU seconds; 0 for none."""

    def stop(*_):
        raise _TooLong

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def test_mutations(tmp_path, show):
    (tmp_path / "given").mkdir()
    subjects = _subjects(tmp_path / "given")
    runner = _Runner(subjects, tmp_path)
    for name, (path, commands) in subjects.items():  # they take the files as they are
        for command in commands:
            assert runner.command(name, command, path) == "taken", (name, command)
    found, number = Counter(), 0
    problems = []
    while number < CASES:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        numbers = range(number, min(number + BATCH, CASES))
        process = FORK.Process(target=runner.batch, args=(numbers, log), daemon=True)
        process.start()
        process.join()
        lines = log.read_text().splitlines()
        number += len(lines) // 2
        if len(lines) % 2:  # its process died
            problems.append(f"case {number}: the process ended with {process.exitcode}")
            number += 1
        for line in lines[1::2]:
            outcome = json.loads(line)
            found[outcome if outcome in ("taken", "refused") else "problem"] += 1
            if outcome not in ("taken", "refused"):
                problems.append(outcome)
    show(f"{number} mutations of {len(subjects)} kinds of files: {dict(found)}")
    for problem in problems:
        show(problem)
    assert not problems, f"{len(problems)} problems, such as {problems[0]}"
