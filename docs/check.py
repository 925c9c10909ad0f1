"""Run what README and docs tell people to type.

    python docs/check.py [DOCUMENT...]

A block after `<!-- run -->` runs as it stands; those of one document share a folder, in order. So
do the code cells of a notebook. `<!-- run with SmolLM2 -->` says that the folder holds stand-ins: a
small GGUF file under the name of SmolLM2's, and out/checkpoint-500, an adapter for what
`qalora import` makes of that file in `base`.

Of the other blocks the `qalora` commands are parsed, and the Python is compiled. Why they do not
run is said by `<!-- not run: REASON -->`, which holds for what follows in the document; a block
with neither is a problem.
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
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.ipynb")}
)
_FENCE = re.compile(r"^(<!-- run[^\n]*-->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
_REASON = re.compile(r"<!-- not run: .+? -->", re.DOTALL)
_COMMANDS = ("bash", "sh", "shell", "")
# what tells a block of commands or Python from one that shows output
_PROGRAMS = ("qalora", "pip", "python", "make", "git", "axolotl", "accelerate", "vllm", "mlx_lm")
_CODE = re.compile(rf"^\s*({'|'.join(_PROGRAMS)}|hf|llama-\w+|from|import)\b", re.MULTILINE)
_STAND_INS = "<!-- run with SmolLM2 -->"
_MAKE_STAND_INS = """
import shutil
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from qalora_plugin import QALoRAConfig, export_model, quantize_model
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.quickstart.embedded import base_model_path

settings = {"method": "rtn", "offsets_at": "minimum", "progress": False}
export_model(quantize_model(base_model_path(), "made", **settings).out, FILE, "gguf")
model = AutoModelForCausalLM.from_pretrained(import_model(FILE, "base").out)
settings = QALoRAConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
get_peft_model(model, settings).save_pretrained("out/checkpoint-500")
shutil.rmtree("made")
shutil.rmtree("base")
""".replace("FILE", '"SmolLM2-135M-Instruct.Q4_1.gguf"')


class Block(NamedTuple):
    """A block of a document: its first line, its language, and whether it runs, or has a reason."""

    line: int
    language: str
    text: str
    runs: bool
    excused: bool


def blocks(path):
    """Yield the blocks of a document; the cells of a notebook, which is one program, as one."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        yield Block(1, "python", "\n\n".join("".join(cell["source"]) for cell in cells), True, True)
        return
    reason = _REASON.search(text)
    excused_from = reason.start() if reason else len(text)

    def block(match, language, content, runs):
        line = text[: match.start()].count("\n") + 1
        return Block(line, language, content, runs, match.start() > excused_from)

    for match in _FENCE.finditer(text):
        yield block(match, match[2], match[3], bool(match[1]))
    outside = _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in _INDENTED.finditer(outside):
        if match[0].strip():
            yield block(match, "", match[0], False)


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
    """Run a block in a folder; return what went wrong, or None."""
    command = ["bash", "-euo", "pipefail", "-c", text]
    if language == "python":
        command = [sys.executable, "-c", text]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stderr[-2000:] if done.returncode else None


def prepare(folder):
    """Put the command of this checkout where the blocks find it."""
    script = folder / "bin" / "qalora"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m qalora_plugin "$@"\n')
    script.chmod(0o755)


def judge(block, folder):
    """Run a block, or parse what it holds; yield what is wrong with it."""
    if block.runs:
        if problem := execute(block.language, block.text, folder):
            yield problem
        return
    is_code = block.language in _COMMANDS and _CODE.search(block.text)
    if (block.language == "python" or is_code) and not block.excused:
        yield "does not run, and no comment `<!-- not run: REASON -->` before it says why"
    if block.language == "python":
        try:
            ast.parse(block.text)
        except SyntaxError as error:
            yield str(error)
    elif block.language in _COMMANDS:
        for words in commands(block.text):
            if problem := parse(words):
                yield f"qalora {' '.join(words)}: {problem}"


def check(path):
    """Return the problems of a document, and how many of its blocks ran."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        if _STAND_INS in path.read_text():
            problem = execute("python", _MAKE_STAND_INS, folder)
            if problem:
                return [f"stand-ins: {problem}"], 0
        found = list(blocks(path))
        problems = [
            f"{path.relative_to(ROOT)}:{block.line}: {problem}"
            for block in found
            for problem in judge(block, folder)
        ]
    return problems, sum(block.runs for block in found)


def main():
    """Check the documents, print what is wrong; return 1 if anything is."""
    begin, problems, total = time.monotonic(), [], 0
    documents = [Path(name).resolve() for name in sys.argv[1:]] or DOCUMENTS
    with ProcessPoolExecutor(2) as pool:
        for found, ran in pool.map(check, documents):
            problems, total = problems + found, total + ran
    print(*problems, sep="\n", end="\n" if problems else "")
    print(f"{total} blocks ran, {len(problems)} problems, {time.monotonic() - begin:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
