"""Text that every machine has: instruction pairs cut from the Python standard library.

The quickstart's base model was pretrained on `source_files(held_out=False)`; the modules in
`HELD_OUT_MODULES` were kept out, and the pairs (docstring and signature -> function) come from
those alone. They are also what a model is calibrated on when no text is given.
"""

import ast
import copy
import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import QALoRAError

# Top-level names, so that a module which becomes a package later (pathlib in 3.13) stays held out.
# A name that the running Python does not have is skipped: tkinter where it is packaged apart,
# _pydatetime (datetime's code since 3.12).
HELD_OUT_MODULES = frozenset({
    "_pydatetime", "calendar", "datetime", "fractions", "ftplib", "http", "imaplib", "ipaddress",
    "logging", "mailbox", "pathlib", "statistics", "tarfile", "tkinter",
})  # fmt: skip

# Tests and vendored programs say little about library code; encodings is mostly character tables.
EXCLUDED_DIRECTORIES = frozenset({
    "__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib",
    "lib-dynload", "lib2to3", "site-packages", "test", "tests", "turtledemo",
})  # fmt: skip

# The model card's chat template writes the same two headings around a user message.
PROMPT_TEMPLATE = "### Task\n{instruction}\n### Answer\n"
_DOCSTRING_CHARS = 72
EVALUATION_BUCKETS = 8  # one pair in eight is held out for evaluation


def source_files(stdlib: Path | None = None, *, held_out: bool) -> list[Path]:
    """Return the standard library's sources, sorted by name.

    Args:
        stdlib: directory of the standard library; by default that of the running Python.
        held_out: whether to return those of `HELD_OUT_MODULES`, or all others, which the base
            model may be trained on.

    Raises:
        QALoRAError: the directory holds no such source.
    """
    root = _root(stdlib)
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        module = parts[0].removesuffix(".py")
        # config-3.x-<platform> holds build scripts of this machine.
        if any(part in EXCLUDED_DIRECTORIES or part.startswith("config-") for part in parts):
            continue
        if (module in HELD_OUT_MODULES) == held_out and not module.startswith("_sysconfigdata"):
            files.append(path)
    if not files:
        raise QALoRAError(
            f"{root}: expected the Python sources of the standard library, found none. "
            "Use a Python installation with its sources, or pass --dataset."
        )
    return files


def load_pairs(
    split: str = "train", *, max_chars: int = 800, stdlib: Path | None = None
) -> list[dict[str, str]]:
    """Cut instruction pairs from the held-out modules of the standard library.

    A pair's prompt holds the first paragraph of a function's docstring and its signature; the
    completion is the function without its docstring, dedented. The split depends on the function's
    name alone (SHA-256), so neither the order of the files nor the other functions move a pair.

    Args:
        split: "train" or "eval".
        max_chars: functions whose prompt or completion is longer are left out. The embedded model's
            tokenizer makes about 3 characters a token, its context is 512 tokens.
        stdlib: directory of the standard library; by default that of the running Python.

    Returns:
        Dicts `{"prompt": str, "completion": str}` (TRL's prompt-completion format), in order.

    Raises:
        QALoRAError: unknown split, or no source was found to cut from.
    """
    _check_split(split)
    root = _root(stdlib)
    pairs: list[dict[str, str]] = []
    seen: set[str] = set()
    for path in source_files(root, held_out=True):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for name, pair in _pairs_in(path):
            # Functions repeated in several classes would leak from train into eval.
            if seen.isdisjoint(pair.values()) and max(map(len, pair.values())) <= max_chars:
                seen.update(pair.values())
                digest = hashlib.sha256(f"{module}:{name}".encode()).digest()
                bucket = int.from_bytes(digest[:4], "big") % EVALUATION_BUCKETS
                if (split == "eval") == (bucket == 0):
                    pairs.append(pair)
    if not pairs:
        raise QALoRAError(
            f"{root}: expected functions with docstrings in {', '.join(sorted(HELD_OUT_MODULES))}, "
            "found none. Use a Python installation with its sources, or pass --dataset."
        )
    return pairs


def load_docstrings(
    split: str = "train", *, max_chars: int = 200, stdlib: Path | None = None
) -> list[dict[str, str]]:
    """Cut pairs (function -> its one-line docstring) from the whole standard library.

    They are for models that were not trained by us. The split depends on the function's text alone
    (SHA-256).

    Args:
        split: "train" or "eval".
        max_chars: functions that are longer are left out, as are docstrings of more than 72.
        stdlib: directory of the standard library; by default that of the running Python.

    Returns:
        Dicts `{"prompt": str, "completion": str}`, in order of their SHA-256: any part of them is
        a mixture of all modules.

    Raises:
        QALoRAError: unknown split, or no source was found to cut from.
    """
    _check_split(split)
    return [
        {"prompt": code, "completion": docstring}
        for digest, code, docstring in _docstrings(max_chars, _root(stdlib))
        if (split == "eval") == (digest[0] % EVALUATION_BUCKETS == 0)
    ]


@lru_cache(maxsize=1)  # reading the whole library takes seconds, and both splits need it
def _docstrings(max_chars: int, root: Path) -> list[tuple[bytes, str, str]]:
    """Return (SHA-256 of the function, function, docstring), in order of the first."""
    found: list[tuple[bytes, str, str]] = []
    seen: set[str] = set()
    for held_out in (False, True):
        for path in source_files(root, held_out=held_out):
            for function in _functions_in(path):
                docstring = ast.get_docstring(function) or ""
                one_line = len(docstring) <= _DOCSTRING_CHARS and "\n" not in docstring
                if not one_line or not docstring.endswith(".") or docstring in seen:
                    continue
                code = _without_docstring(function)
                if len(code) > max_chars or code in seen:
                    continue
                seen.update((code, docstring))
                found.append((hashlib.sha256(code.encode()).digest(), code, docstring))
    return sorted(found)


def calibration_texts(stdlib: Path | None = None) -> list[str]:
    """Return the training pairs (see `load_pairs`) as plain texts, to calibrate GPTQ on."""
    return [pair["prompt"] + pair["completion"] for pair in load_pairs("train", stdlib=stdlib)]


def _check_split(split: str) -> None:
    if split not in ("train", "eval"):
        raise QALoRAError(f"split: expected 'train' or 'eval', found {split!r}.")


def _root(stdlib: Path | None) -> Path:
    return Path(stdlib or sysconfig.get_path("stdlib"))


def _pairs_in(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (qualified name, pair) of every function that has a docstring and a body."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name, docstring = f"{prefix}{child.name}", ast.get_docstring(child)
                if docstring and len(child.body) > 1 and not isinstance(child, ast.ClassDef):
                    yield name, _pair(child, docstring)
                yield from visit(child, f"{name}.")

    yield from visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)), "")


def _pair(function: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str) -> dict[str, str]:
    summary = docstring.strip().split("\n\n")[0]
    # unparse gives one style, without comments, and the same text whatever the indentation was.
    arguments = ast.unparse(function.args)
    instruction = f"{summary}\nName: {function.name}\nArguments: {arguments}"
    return {
        "prompt": PROMPT_TEMPLATE.format(instruction=instruction),
        "completion": _without_docstring(function) + "\n",
    }


def _functions_in(path: Path) -> Iterator[ast.FunctionDef]:
    """Yield the functions, methods among them, that have a docstring and a body."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            yield node


def _without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    without = copy.copy(function)
    without.body = function.body[1:]
    without.decorator_list = []
    return ast.unparse(without)
