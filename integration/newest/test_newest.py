"""The newest releases of transformers, PEFT and TRL: the tests that touch them pass there too."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
AREAS = ("checkpoint", "hf", "hub", "layers", "merge", "training", "tuner")


def test_the_fast_suite_passes_on_the_newest_releases(env_python, project_path, run_python):
    tests = [TESTS / area for area in AREAS]
    # the tests' stand-in of the Hub does not speak Xet, the newest huggingface_hub's way to upload
    environment = {"PYTHONPATH": project_path, "HF_HUB_DISABLE_XET": 1}
    command = [env_python("newest"), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run_python(*command, timeout=None, **environment)
