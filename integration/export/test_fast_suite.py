"""tests/formats with every target's own library at hand; the pinned `.venv` holds none of them."""

from qalora_plugin.quickstart.smollm2 import find_smollm2


def test_exports_equal_ours_in_the_targets_own_libraries(env_python, run_python, project_path):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/formats"]
    environment = {"PYTHONPATH": project_path, "QALORA_SMOLLM2": find_smollm2()}
    printed = run_python(env_python("export"), *command, timeout=None, **environment)
    assert "skipped" not in printed.splitlines()[-1], printed[-4000:]
