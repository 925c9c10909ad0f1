"""Compiling C code: once, into a place that is ours alone; and what happens where that fails."""

import ctypes
import hashlib
import os
import pwd
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.backends import cpu
from qalora_kernels.backends import torch as plain
from qalora_kernels.backends.cpu import build


@pytest.fixture
def compiler():
    try:
        build._compiler()
    except OSError:
        pytest.skip("no C compiler: the plain PyTorch path is all there is to test")


@pytest.fixture
def compilations(monkeypatch):
    """For each run of the compiler the directory of its output and that one's mode."""
    run, outputs = subprocess.run, []

    def record(command, **kwargs):
        directory = Path(command[command.index("-o") + 1]).parent
        outputs.append((directory, directory.stat().st_mode & 0o777))
        return run(command, **kwargs)

    monkeypatch.setattr(subprocess, "run", record)
    return outputs


@pytest.fixture
def loads(monkeypatch, compilations):
    """For each library that was loaded its path and how often the compiler had run before."""
    load, loaded = ctypes.CDLL, []

    def record(path):
        loaded.append((Path(path), len(compilations)))
        return load(path)

    monkeypatch.setattr(ctypes, "CDLL", record)
    return loaded


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A file that takes no seconds to compile, in place of the operators."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "layer.h").touch()
    (directory / "small.c").write_text("int answer(void) { return 42; }")
    monkeypatch.setattr(build, "_HERE", directory)
    return directory


@pytest.fixture
def library(fresh_library, sources):
    """Loads the library as a process that has just started would."""

    def get():
        fresh_library.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = fresh_library("small.c")
        return loaded.answer() == 42

    return get


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "qalora-plugin" / "cpu"


def weight():
    spec = QuantSpec(4, 32, 96, 70)
    codes = torch.randint(0, 16, (70, 96), generator=torch.Generator().manual_seed(1))
    return PackedWeight.from_codes(codes, torch.ones(3, 70), torch.zeros(3, 70), None, spec)


def test_it_is_compiled_once(compiler, library, kept, compilations):
    assert library()
    assert sorted(path.suffix for path in kept.iterdir()) == [".sha256", ".so"]
    assert kept.stat().st_mode & 0o777 == 0o700
    assert library()
    assert len(compilations) == 1


@pytest.mark.parametrize("damage", ["torn", "empty", "other", "no hash", "wrong hash", "link"])
def test_what_is_not_as_it_was_stored_is_never_loaded(
    damage, compiler, library, kept, compilations, loads
):
    library()
    (file,), (digest,) = kept.glob("*.so"), kept.glob("*.sha256")
    good = file.read_bytes()
    if damage == "link":
        file.rename(kept.parent / "real.so")
        file.symlink_to(kept.parent / "real.so")
    elif damage == "no hash":
        digest.unlink()
    elif damage == "wrong hash":
        digest.write_text("0" * 64)
    else:
        contents = {"torn": good[: len(good) // 2], "empty": b"", "other": good + b"x"}
        file.unlink()  # this process has the good one in memory
        file.write_bytes(contents[damage])
    assert library()
    assert loads == [(file, 1), (file, 2)]  # compiled again before it was loaded
    assert not file.is_symlink()
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest.read_text()
    assert library()
    assert len(compilations) == 2


def test_a_torn_library_does_not_kill_the_process(compiler, library, kept, sources):
    """It would load, and SIGBUS comes when one of its missing pages is touched."""
    library()
    (file,) = kept.glob("*.so")
    torn = file.read_bytes()[:4096]
    file.unlink()
    file.write_bytes(torn)
    script = "import sys; from pathlib import Path; from qalora_kernels.backends.cpu import build; "
    script += "build._HERE = Path(sys.argv[1]); print(build.library('small.c').answer())"
    command = [sys.executable, "-c", script, str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "42\n", done.stderr


@pytest.mark.parametrize("why", ["mode", "owner"])
def test_nothing_is_kept_where_another_user_could_have_planted_it(
    why, compiler, library, kept, compilations, loads, monkeypatch, caplog
):
    library()
    if why == "mode":
        kept.chmod(0o777)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)
    before = sorted(kept.iterdir())
    for _ in range(2):
        assert library()
    (_, (one, mode), (two, _)), (_, *loaded) = compilations, loads
    assert [path.parent for path, _ in loaded] == [one, two]
    assert one != two and mode == 0o700  # a place that nobody could prepare
    assert not one.exists() and not two.exists()
    assert sorted(kept.iterdir()) == before
    assert "every process compiles anew" in caplog.text and "remove it" in caplog.text


def test_a_file_of_another_user_is_not_loaded(compiler, library, kept, compilations, monkeypatch):
    library()
    (file,) = kept.glob("*.so")
    inode, real, other = file.stat().st_ino, os.fstat, os.geteuid() + 1

    def planted(descriptor):
        found = real(descriptor)
        if found.st_ino != inode:
            return found
        return os.stat_result([*found[:4], other, *found[5:]])

    monkeypatch.setattr(os, "fstat", planted)
    assert library()
    assert len(compilations) == 2 and file.stat().st_ino != inode


def test_a_cache_that_cannot_be_written_is_no_obstacle(compiler, library, tmp_path, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert library()


def test_a_user_id_that_the_system_does_not_know(compiler, library, monkeypatch, caplog):
    """As in a container run under any user id: no HOME, and no entry in its passwd file."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert library()
    assert "set HOME or XDG_CACHE_HOME" in caplog.text


@pytest.mark.parametrize("command", ["/nonexistent/cc", "false", "gcc 'unclosed"])
def test_without_a_compiler_plain_pytorch_serves(command, fresh_library, kept, monkeypatch):
    monkeypatch.setenv("CC", command)
    monkeypatch.setattr(cpu, "FEW_ROWS_WEIGHTS", 0)
    packed = weight()
    x, dy = torch.randn(3, 96).bfloat16(), torch.randn(3, 70).bfloat16()
    with pytest.warns(RuntimeWarning, match="Install gcc, or set QALORA_BACKEND=torch"):
        out = cpu.linear(x, packed, None)
    assert torch.equal(out, plain.linear(x, packed, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        grad = cpu.weighted_group_grad(dy, x, packed)
        dx = cpu.grad_input(dy, packed)
    assert torch.equal(grad, plain.weighted_group_grad(dy, x, packed))
    assert torch.equal(dx, plain.grad_input(dy, packed))
    assert list(kept.glob("*")) == []
