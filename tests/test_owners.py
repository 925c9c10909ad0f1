"""One owner for every rule: what must stand in one file of the package, and stands nowhere else."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qalora_plugin", "kernels/qalora_kernels", "kernels/qalora_vllm")
# programs that run in other environments, where this package is not installed
STANDALONE = ("run.py",)


@cache
def _sources():
    """Return (strings that are no docstrings, code without strings) of every file by its name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name not in STANDALONE:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found[str(path.relative_to(ROOT))] = (list(_take_strings(tree)), ast.unparse(tree))
    return found


def _take_strings(tree):
    """Empty every string of a file, and yield those that are no docstrings."""
    nodes = list(ast.walk(tree))
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                yield node.value
            node.value = ""


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("qalora_A", "qalora_plugin/tuner/names.py"),
        ("qalora_scale_A", "qalora_plugin/tuner/names.py"),
        ("adapter_config.json", "qalora_plugin/files/names.py"),
        ("adapter_model.safetensors", "qalora_plugin/files/names.py"),
        ("model.safetensors.index.json", "qalora_plugin/files/names.py"),
        ("qalora_manifest.json", "qalora_plugin/files/names.py"),
        ("qalora_export.json", "qalora_plugin/files/names.py"),
        ("quantize_config.json", "qalora_plugin/files/names.py"),
        ("_is_hf_initialized", "qalora_plugin/layers/absent.py"),
        (".cache", "kernels/qalora_kernels/cache.py"),
    ],
)
def test_a_literal_has_one_owner(text, owner):
    found = {name for name, (strings, _) in _sources().items() if any(text in s for s in strings)}
    assert found == {owner}


@pytest.mark.parametrize(
    ("code", "owners"),
    [
        ("os.replace", {"qalora_plugin/files/atomic.py", "kernels/qalora_kernels/cache.py"}),
        ("os.rename", {"qalora_plugin/files/atomic.py"}),
        ("indent=2", {"qalora_plugin/files/json.py"}),
        ("init_empty_weights(", {"qalora_plugin/architecture/model.py"}),
        ("fnmatchcase(", {"kernels/qalora_kernels/stored.py"}),
        ("snapshot_download(", {"qalora_plugin/files/hub.py"}),
    ],
)
def test_an_operation_has_one_owner(code, owners):
    assert {name for name, (_, text) in _sources().items() if code in text} == owners


def test_no_module_is_loose():
    loose = {path.name for path in (ROOT / "qalora_plugin").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "_version.py", "errors.py"}


def test_no_file_is_too_long():
    folders = ("qalora_plugin", "kernels", "recipes", "integration", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
