"""What tests/formats skips in the pinned `.venv`, with every target's own library at hand."""

from pathlib import Path

from qalora_plugin.quickstart.smollm2 import find_smollm2

TESTS = Path(__file__).resolve().parents[2] / "tests" / "formats"


def test_exports_equal_ours_in_the_targets_own_libraries(env_python, run_python, project_path):
    skipping = ("skip(", "smollm2")
    found = {path: path.read_text() for path in sorted(TESTS.glob("test_*.py"))}
    tests = [path for path, text in found.items() if any(word in text for word in skipping)]
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {"PYTHONPATH": project_path, "QALORA_SMOLLM2": find_smollm2()}
    printed = run_python(env_python("export"), *command, timeout=None, **environment)
    assert "skipped" not in printed.splitlines()[-1], printed[-4000:]
