"""The user's cache directory: where it is, who can have written to it, and how files get there."""

import os
import pwd
from pathlib import Path

import pytest

from qalora_kernels import cache


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qalora-plugin"


def test_where_it_is(root, monkeypatch):
    assert cache.path("cpu", "a.so") == root / "cpu" / "a.so"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.path() == Path("/home/someone/.cache/qalora-plugin")


def test_a_user_without_a_home_directory(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    no_home(monkeypatch)
    with pytest.raises(OSError, match="set HOME or XDG_CACHE_HOME"):
        cache.path("cpu")


def no_home(monkeypatch):
    """As in a container that runs under a user id which its passwd file does not know."""
    monkeypatch.delenv("HOME", raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_private_directory_is_made_for_us_alone(root):
    before = os.umask(0)
    try:
        directory = cache.private_directory("cpu")
    finally:
        os.umask(before)
    assert directory == root / "cpu" and directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o755)  # ours, and nobody else could write
    assert cache.private_directory("cpu").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_write_to_is_refused():
    directory = cache.private_directory("cpu")
    for mode in (0o770, 0o707, 0o720, 0o702):
        directory.chmod(mode)
        with pytest.raises(PermissionError, match=rf"expected .* mode 0700, found .* {mode:04o}"):
            cache.private_directory("cpu")


def test_a_link_instead_of_a_directory_is_refused(root, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.mkdir()
    (root / "cpu").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError):
        cache.private_directory("cpu")


def test_what_belongs_to_another_user_is_refused(root, monkeypatch):
    directory = cache.private_directory("cpu")
    cache.write(directory / "file", b"planted")
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(PermissionError, match="expected a directory of this user's"):
        cache.private_directory("cpu")
    with pytest.raises(PermissionError, match="expected a file of this user's"):
        cache.read_own(directory / "file")


def test_only_regular_files_are_read(root):
    directory = cache.private_directory("cpu")
    cache.write(directory / "file", b"data")
    assert cache.read_own(directory / "file") == b"data"
    (directory / "link").symlink_to("file")
    for name in ("link", "missing"):
        with pytest.raises(OSError):
            cache.read_own(directory / name)


def test_a_file_is_written_whole_or_not_at_all(root, monkeypatch):
    file = cache.path("tuning.json")
    cache.write(file, b"old")

    def fail(source, target):
        assert Path(source).read_bytes() == b"new" and file.read_bytes() == b"old"
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            cache.write(file, b"new")
    assert file.read_bytes() == b"old"
    cache.write(file, b"new")
    assert file.read_bytes() == b"new"
    assert [each.name for each in root.iterdir()] == ["tuning.json"]
