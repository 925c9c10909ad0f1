"""tests/formats with every target's own library at hand; the pinned `.venv` holds none of them."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_exports_equal_ours_in_the_targets_own_libraries(
    env_python: Callable[[str], Path], project_path: Path
) -> None:
    tests = str(ROOT / "tests" / "formats")
    command = [str(env_python("export")), "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "PYTHONPATH": str(project_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-4000:]
