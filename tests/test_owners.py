"""One owner for every rule: what must stand in one file of the package, and stands nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qalora_plugin", "kernels/qalora_kernels")
# programs that run in other environments, where this package is not installed
STANDALONE = ("run.py",)


def _sources(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        if path.name not in STANDALONE:
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def _without_docstrings(tree: ast.Module) -> Iterator[ast.AST]:
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return (node for node in ast.walk(tree) if id(node) not in docstrings)


def _strings(tree: ast.Module) -> Iterator[str]:
    for node in _without_docstrings(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


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
def test_a_literal_has_one_owner(text: str, owner: str) -> None:
    found = {
        name
        for package in PACKAGES
        for name, tree in _sources(package)
        if any(text in value for value in _strings(tree))
    }
    assert found == {owner}


@pytest.mark.parametrize(
    ("code", "owners"),
    [
        ("os.replace", {"qalora_plugin/files/atomic.py", "kernels/qalora_kernels/cache.py"}),
        ("os.rename", {"qalora_plugin/files/atomic.py"}),
        ("indent=2", {"qalora_plugin/files/json.py"}),
        ("init_empty_weights(", {"qalora_plugin/architecture/model.py"}),
        ("fnmatchcase(", {"qalora_plugin/architecture/names.py"}),
        ("snapshot_download(", {"qalora_plugin/files/hub.py"}),
    ],
)
def test_an_operation_has_one_owner(code: str, owners: set[str]) -> None:
    found = set()
    for package in PACKAGES:
        for name, tree in _sources(package):
            if code in "\n".join(ast.unparse(node) for node in tree.body):
                found.add(name)
    assert found == owners


def test_no_module_is_loose() -> None:
    loose = {path.name for path in (ROOT / "qalora_plugin").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "_version.py", "errors.py"}


def test_no_file_is_too_long() -> None:
    folders = ("qalora_plugin", "kernels", "recipes", "integration", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
