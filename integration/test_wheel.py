"""What a user gets from the wheel: every file of the packages, and no other top-level name."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qalora_plugin", "kernels/qalora_kernels", "kernels/qalora_vllm")


def _files(folder):
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder.parent)) for p in found}


def test_wheel_holds_the_packages_entirely(project_path):
    for folder in map(Path, PACKAGES):
        assert _files(project_path / folder.name) == _files(ROOT / folder)


def test_wheel_claims_no_other_name(project_path):
    [record] = project_path.glob("*.dist-info/top_level.txt")
    names = {Path(folder).name for folder in PACKAGES}
    assert set(record.read_text().split()) == names | {"qalora_command"}


def test_version_has_one_owner(project_path):
    [metadata] = project_path.glob("*.dist-info/METADATA")
    stated = re.search(r"^Version: (.+)$", metadata.read_text(), re.MULTILINE)[1]
    source = (ROOT / "qalora_plugin" / "_version.py").read_text()
    assert f'__version__ = "{stated}"\n' in source
    assert f'"{stated}"' not in (ROOT / "pyproject.toml").read_text()


def test_sdist_makes_the_same_wheel(project_path, project_source, tmp_path):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    build = [sys.executable, "-c", code]
    done = subprocess.run(build, cwd=project_source, check=True, capture_output=True, text=True)
    sdist = project_source / "dist" / done.stdout.splitlines()[-1]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path, sdist], check=True)
    for folder in map(Path, PACKAGES):
        assert _files(tmp_path / folder.name) == _files(project_path / folder.name)
    assert (tmp_path / "qalora_command.py").is_file()
