"""What the documentation site needs beside its pages: files from outside docs/, and all messages.

A page may link to a file of the repository (`../recipes/...`), which GitHub shows and the site does
not have: images are copied, other links become plain text. messages.md lists every error message of
the packages, read from their sources.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (ROOT / "qalora_plugin", ROOT / "kernels")
MESSAGES = "messages.md"
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)#]+)(#[^)]*)?\)")
_IMAGES = (".svg", ".png")


@cache
def error_classes():
    """Return the names of the errors of qalora_plugin/errors.py, by their docstrings."""
    tree = ast.parse((ROOT / "qalora_plugin" / "errors.py").read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: ast.get_docstring(node) for node in classes}


def _text(node):
    """Return the text of a message with … for what is filled in; None where it is not text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_text(node.left) or "…") + (_text(node.right) or "…")
    if isinstance(node, ast.IfExp):
        return _text(node.body)
    return None


def _makers(trees):
    """Return which class of error a function or method of this name makes, by its annotation."""
    makers = {name: name for name in error_classes()}
    for tree in trees.values():
        for node in ast.walk(tree):
            made = getattr(getattr(node, "returns", None), "id", None)
            if isinstance(node, ast.FunctionDef) and made in error_classes():
                makers[node.name] = made
    return makers


@cache
def messages():
    """Return (class, file, line, message) of every error of ours that is made in the packages.

    A message that is put together elsewhere is None.
    """
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    makers, found = _makers(trees), []
    for place, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name in makers:
                texts = [text for text in map(_text, node.args) if text is not None]
                found.append((makers[name], place, node.lineno, max(texts, key=len, default=None)))
    return found


def catalogue():
    """Return messages.md."""
    lines = ["# Every error message", "", "What a message fills in is written …. What to do is"]
    lines += ["part of the message; [troubleshooting](troubleshooting.md) says more.", ""]
    for name, about in error_classes().items():
        lines += [f"## {name}", "", str(about), ""]
        for found, place, line, text in messages():
            if found == name:
                shown = "put together there" if text is None else "`" + text.replace("`", "'") + "`"
                lines.append(f"- {shown} ({place}, line {line})")
        lines.append("")
    return "\n".join(lines)


def on_files(files, config):
    """Add the list of messages, and the images outside docs/ that pages show."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, MESSAGES, content=catalogue()))
    for page in Path(config.docs_dir).glob("*.md"):
        for _, _, target, _ in _OUTSIDE.findall(page.read_text()):
            path = (page.parent / target).resolve()
            place = f"outside/{path.relative_to(ROOT)}"
            if path.suffix in _IMAGES and files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links to images outside docs/ to their copies; leave the text of other such links."""

    def inside(match):
        image, text, target, _ = match.groups()
        path = (Path(config.docs_dir) / target).resolve()
        if path.suffix in _IMAGES:
            return f"{image}[{text}](outside/{path.relative_to(ROOT)})"
        return text

    return _OUTSIDE.sub(inside, markdown)
