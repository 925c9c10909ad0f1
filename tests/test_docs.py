"""README and docs: links lead to files, and what they import is public."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes/README.md"})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_imports_are_names_of_a_package():
    text = "\n".join(document.read_text() for document in DOCUMENTS)
    imports = set(re.findall(r"from (qalora_plugin[\w.]*) import ([\w, ]+\w)", text))
    assert len(imports) >= 4
    for module, names in imports:
        package = importlib.import_module(module)
        assert hasattr(package, "__path__"), f"docs import from the module {module}"
        for name in names.split(", "):
            assert hasattr(package, name), f"docs import {name} from {module}"
