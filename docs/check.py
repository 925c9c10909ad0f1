"""Run what README and docs tell people to type.

    python docs/check.py [DOCUMENT...]

A block after `<!-- run -->` runs as it stands; those of one document share an empty folder, in
order. So do the code cells of a notebook. Other blocks need a model from the Hub, a GPU, another
environment, or a training before them: their `qalora` commands are parsed, and their Python is
compiled.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.ipynb")}
)
MARK = "<!-- run -->"
_FENCE = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
_COMMANDS = ("bash", "sh", "shell", "")


def blocks(path):
    """Yield (line, language, text, whether it runs) of the blocks of a document."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(text)["cells"], start=1):
            if cell["cell_type"] == "code":
                yield number, "notebook", "".join(cell["source"]), True
        return
    for match in _FENCE.finditer(text):
        yield text[: match.start()].count("\n") + 1, match[2], match[3], bool(match[1])
    outside = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in _INDENTED.finditer(outside):
        yield outside[: match.start()].count("\n") + 1, "", match[0], False


def commands(text):
    """Yield the `qalora` command lines of a block, continued lines joined."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True) if "qalora " in part else []
            if words and Path(words[0]).name == "qalora":
                yield words[1 : words.index(">") if ">" in words else None]


def parse(words):
    """Return what argparse says against a command line, None if it takes it."""
    from qalora_plugin.cli import build_parser

    if "COMMAND" in words or "FORMAT" in words or "|" in words[0]:  # what stands for several
        return None
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(StringIO()):
            build_parser().parse_args(words)
    except SystemExit as end:
        return said.getvalue().splitlines()[-1] if end.code else None
    return None


def execute(language, text, folder):
    """Run a block, or the cells of a notebook, in a folder; return what went wrong, or None."""
    command = ["bash", "-euo", "pipefail", "-c", text]
    if language in ("python", "notebook"):
        command = [sys.executable, "-c", text]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stderr[-2000:] if done.returncode else None


def prepare(folder):
    """Put the command of this checkout where the blocks find it."""
    script = folder / "bin" / "qalora"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qalora_plugin "$@"\n')
    script.chmod(0o755)


def check(path):
    """Return the problems of a document, and how many of its blocks ran."""
    problems, ran = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        found = list(blocks(path))
        if path.suffix == ".ipynb":  # one interpreter for all cells
            found = [(1, "notebook", "\n\n".join(text for _, _, text, _ in found), True)]
        for line, language, text, runs in found:
            where = f"{path.relative_to(ROOT)}:{line}"
            if runs:
                ran += 1
                if problem := execute(language, text, folder):
                    problems.append(f"{where}: {problem}")
            elif language == "python":
                try:
                    ast.parse(text)
                except SyntaxError as error:
                    problems.append(f"{where}: {error}")
            elif language in _COMMANDS:
                said = ((words, parse(words)) for words in commands(text))
                problems += [f"{where}: qalora {' '.join(w)}: {p}" for w, p in said if p]
    return problems, ran


def main():
    """Check the documents, print what is wrong; return 1 if anything is."""
    begin, problems, total = time.monotonic(), [], 0
    for path in [Path(name).resolve() for name in sys.argv[1:]] or DOCUMENTS:
        found, ran = check(path)
        problems, total = problems + found, total + ran
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{total} blocks ran, {len(problems)} problems, {time.monotonic() - begin:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
