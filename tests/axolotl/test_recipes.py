"""The recipes are what their generator writes."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_committed_recipes_equal_the_generators_output() -> None:
    command = [sys.executable, ROOT / "recipes" / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list((ROOT / "recipes" / "models").glob("*.yaml"))) == 14 * 3
    assert len(list((ROOT / "recipes" / "paper").glob("*.yaml"))) == 7 * 2
