"""What a user gets from the wheel: every file of the packages, and no other top-level name."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _files(folder):
    found = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {str(p.relative_to(folder.parent)) for p in found}


def test_wheel_holds_both_packages_entirely(project_path):
    sources = _files(ROOT / "qalora_plugin") | _files(ROOT / "kernels" / "qalora_kernels")
    installed = _files(project_path / "qalora_plugin") | _files(project_path / "qalora_kernels")
    assert installed == sources


def test_wheel_claims_no_other_name(project_path):
    [record] = project_path.glob("*.dist-info/top_level.txt")
    assert set(record.read_text().split()) == {"qalora_command", "qalora_kernels", "qalora_plugin"}
