"""The newest releases of transformers, PEFT and TRL: the tests that touch them pass there too."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
AREAS = ("checkpoint", "hf", "hub", "merge", "training", "tuner")
ALONE = "*/test_layer_*.py"  # our arithmetic on torch alone, which is the same release


def test_the_fast_suite_passes_on_the_newest_releases(env_python, project_path, run_python):
    tests = [TESTS / area for area in AREAS]
    # the tests' stand-in of the Hub does not speak Xet, the newest huggingface_hub's way to upload
    environment = {"PYTHONPATH": project_path, "HF_HUB_DISABLE_XET": 1}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"--ignore-glob={ALONE}", *tests]
    run_python(env_python("newest"), *command, timeout=None, **environment)
