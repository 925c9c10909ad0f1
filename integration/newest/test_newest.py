"""The newest releases of transformers, PEFT and TRL: the tests that touch them pass there too."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AREAS = ("checkpoint", "tuner", "merge", "trl", "hub")


def test_the_fast_suite_passes_on_the_newest_releases(
    env_python: Callable[[str], Path], project_path: Path
) -> None:
    tests = [str(ROOT / "tests" / area) for area in AREAS]
    command = [str(env_python("newest")), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # the tests' stand-in of the Hub does not speak Xet, the newest huggingface_hub's way to upload
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
    environment = {**os.environ, "PYTHONPATH": str(project_path), **offline}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
