"""The environment builder: naming, reuse, and builds that were cut short."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent / "build.py"


@pytest.fixture
def builder(tmp_path, monkeypatch):
    """The builder with its own requirement files, `empty` and its include, and its own cache."""
    spec = importlib.util.spec_from_file_location("build", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    requirements = tmp_path / "requirements"
    requirements.mkdir()
    (requirements / "empty.txt").write_text("-c pins.constraints\n")
    (requirements / "pins.constraints").write_text("numpy==2.3.5\n")
    monkeypatch.setattr(module, "HERE", requirements)
    monkeypatch.setenv("QALORA_ENV_CACHE", str(tmp_path / "cache"))
    return module


def test_every_environment_is_pinned():
    for requirements in SCRIPT.parent.glob("*.txt"):
        if requirements.stem.endswith(".uninstall"):
            continue
        lines = [line.partition("#")[0].strip() for line in requirements.read_text().splitlines()]
        included = any(line.startswith("-c") for line in lines)
        loose = [x for x in lines if x and not x.startswith("-") and "==" not in x]
        assert included or not loose, f"{requirements.name} does not pin {loose}"


def test_an_included_file_changes_the_directory(builder):
    before = builder.environment_dir("empty")
    (builder.HERE / "pins.constraints").write_text("numpy==2.3.4\n")
    assert builder.environment_dir("empty") != before


def test_build_reuses_a_finished_environment_and_remakes_a_broken_one(builder):
    python = builder.build("empty")
    assert subprocess.run([python, "-c", "import pip"]).returncode == 0
    marker = python.parents[1] / "marker"
    marker.touch()
    assert builder.build("empty") == python
    assert marker.exists()
    (python.parents[1] / builder.STAMP).unlink()
    assert builder.build("empty") == python
    assert not marker.exists()


def test_packages_are_removed_and_metadata_made(builder):
    (builder.HERE / "empty.uninstall.txt").write_text("# too much\nsetuptools\n")
    (builder.HERE / "empty.metadata.txt").write_text("engine==1.2\n")
    assert builder.names() == ["empty"]
    python = builder.build("empty")
    ask = "import importlib.metadata as m; print(m.version('engine')); m.version('setuptools')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    assert done.stdout == "1.2\n"
    assert "PackageNotFoundError" in done.stderr
