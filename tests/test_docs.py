"""README and docs: links lead to files, and what they import is public."""

import importlib
import importlib.util
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes/README.md"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    made = {"messages.md"}  # by docs/hooks.py
    lost = [link for link in links if not (document.parent / link).exists()]
    assert [link for link in lost if link not in made] == []


def test_imports_are_names_of_a_package():
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    imports = set(re.findall(r"from (qalora_plugin[\w.]*) import ([\w, ]+\w)", text))
    assert len(imports) >= 4
    for module, names in imports:
        package = importlib.import_module(module)
        assert hasattr(package, "__path__"), f"docs import from the module {module}"
        for name in names.split(", "):
            assert hasattr(package, name), f"docs import {name} from {module}"


def test_every_page_is_on_the_site():
    pages = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")} | {"messages.md"}


@pytest.mark.parametrize("trainer", ["DPOTrainer", "GRPOTrainer"])
def test_a_training_takes_ten_lines(trainer):
    """Which `make docs-check` runs."""
    text = (ROOT / "docs" / "preference.md").read_text()
    blocks = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.DOTALL)
    (block,) = [block for block in blocks if f"import {trainer[:-7]}Config, {trainer}" in block]
    assert f"{trainer}(" in block and ".train()" in block
    assert len(list(filter(None, block.splitlines()))) <= 10


def _program(name):
    """Import a program of docs/, which is no package."""
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hooks():
    return _program("hooks")


def test_every_block_runs_or_says_why_not():
    """The others `make docs-check` runs."""
    check = _program("check")
    found = [(path.name, b) for path in check.DOCUMENTS for b in check.blocks(path)]
    assert sum(block.runs for _, block in found) >= 10
    wrong = [
        f"{name}:{block.line}: {problem}"
        for name, block in found
        if not block.runs
        for problem in check.judge(block, folder=None)
    ]
    assert wrong == []


def test_every_error_has_an_entry():
    hooks = _hooks()
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    sections = re.findall(r"^## (\w+Error)$", text, re.MULTILINE)
    assert sections == list(hooks.error_classes())
    listed = {(place, line) for _, place, line, _ in hooks.messages()}
    raised = set()
    for path in (ROOT / "qalora_plugin").rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if re.search(rf"raise ({'|'.join(sections)})\(", line):
                raised.add((str(path.relative_to(ROOT)), number))
    assert len(raised) > 200 and raised <= listed
    catalogue = hooks.catalogue()
    assert catalogue.count(".py, line ") == len(hooks.messages())


def test_troubleshooting_quotes_messages_that_exist():
    known = " ".join(text for *_, text in _hooks().messages() if text)
    text = (ROOT / "docs" / "troubleshooting.md").read_text().split("## Messages of other")[0]
    quoted = re.findall(r"^- `([^`]+)`", text, re.MULTILINE)
    assert len(quoted) > 10
    assert [quote for quote in quoted if quote not in known] == []


@pytest.mark.parametrize(
    ("title", "step", "beside"),
    [
        ("merge", "merge", "copy"),
        ("import of GGUF", "import", "copy"),
        ("write back into GGUF", "write back", "copy"),
        ("loading", "load", "load unchecked"),
        ("loading, until the first token", "first token", "first token unchecked"),
    ],
)
def test_what_checking_costs_is_measured(title, step, beside):
    lines = (ROOT / "integration/large/results/checking.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if step in row]
    mine, others = ([row[name][0] for row in rows] for name in (step, beside))
    times = [one / other for one, other in zip(mine, others, strict=True)]
    name = "copying" if beside == "copy" else "without hashes"
    median = statistics.median
    assert (
        f"| {title} | {median(mine):.1f} s | {name}: {median(others):.1f} s | {median(times):.1f} "
        f"({min(times):.1f} to {max(times):.1f}) |"
    ) in (ROOT / "docs" / "checks.md").read_text()
