"""Libraries that were not tested: a warning; too old ones: an error. One table says which."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qalora_plugin._version import LIBRARIES

ROOT = Path(__file__).resolve().parents[2]


def pins(path):
    """Return the versions that a requirements file pins."""
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / path).read_text(), re.MULTILINE))


def test_the_table_is_what_is_declared_and_tested():
    floor, newest = pins("constraints.txt"), pins("integration/envs/newest.txt")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, (needed, first, last) in LIBRARIES.items():
        assert f"{name}>={needed}" in declared
        assert (first, last) == (floor[name], newest[name])


def test_the_page_and_readme_say_the_same():
    page = (ROOT / "docs" / "checks.md").read_text()
    readme = " ".join((ROOT / "README.md").read_text().split())
    for name, (needed, first, last) in LIBRARIES.items():
        assert f"| {name} | {needed} | {first} | {last} |" in page
        low, high = (".".join(version.split(".")[:2]) for version in (first, last))
        assert f"{name} {low}" + (f" to {high}" if high != low else "") in readme


CHECK = """
import sys, qalora_command
qalora_command.running = True  # importing the package registers nothing
from qalora_plugin.hf.versions import check_versions
check_versions()
assert "torch" not in sys.modules
"""


@pytest.fixture
def beside(tmp_path):
    """`beside(code, transformers="4.57.6")` -> what the code prints then, and its status.

    The metadata of a release stand before those of the one that is installed.
    """

    def run(code, **versions):
        for name, version in versions.items():
            (tmp_path / f"{name}-{version}.dist-info").mkdir()
            text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.stderr, done.returncode

    return run


def test_what_is_tested_says_nothing(beside):
    assert beside(CHECK, **{name: last for name, (_, _, last) in LIBRARIES.items()}) == ("", 0)


def test_a_newer_one_is_a_warning(beside):
    printed, status = beside(CHECK, torch="2.99.1", transformers="5.16.4", peft="0.21.9")
    assert status == 0
    tested = LIBRARIES["torch"][1]
    assert printed == f"qalora-plugin was not tested with torch 2.99.1 (tested: {tested})\n"


def test_an_old_one_is_an_error(beside):
    """Importing the package says it, before transformers is imported and fails in its own way."""
    printed, status = beside("import qalora_plugin", transformers="4.57.6")
    assert status == 1
    assert "ConfigError: transformers: expected 5.16.1 or newer, found 4.57.6" in printed
