"""Compile the C sources of this directory on first use, and keep the result in the user's cache.

No compiler, no problem: `library` returns None after one warning and the callers use plain PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_COMMON_FLAGS = ("-O2", "-fopenmp", "-fPIC", "-shared")
# torch reports an instruction set only where all of these are there; -march=native could pick
# more, and then a cache on a shared home directory would crash on the neighbouring machine
_INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qalora-plugin" / "cpu"


def _keep(built: Path, target: Path) -> Path:
    """Move a built library into the cache, by a rename; leave it where it is if that fails."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(built, partial)
        os.replace(partial, target)
    except OSError:
        return built
    return target


@functools.cache
def library(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled `source`, a file of this directory.

    Args:
        source: name of the C file.
        flags: compiler flags of this file, beside those for the machine.

    Returns:
        The loaded library, or None where it cannot be had: there is no C compiler (of `CC`, `cc`,
        `gcc`), it fails, or its output does not load. A RuntimeWarning then says so, once.
    """
    compiler = _compiler()
    machine = _INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), ())
    command = [compiler or "cc", *_COMMON_FLAGS, *machine, *flags]
    text = (_HERE / "layer.h").read_bytes() + (_HERE / source).read_bytes()
    digest = hashlib.sha256(text + " ".join([*command, platform.machine()]).encode()).hexdigest()
    path = _cache_dir() / f"{Path(source).stem}-{digest[:16]}.so"
    try:
        if path.exists():
            return ctypes.CDLL(str(path))
        if compiler is None:
            raise OSError("no C compiler found (cc or gcc, or the one that CC names)")
        with tempfile.TemporaryDirectory() as scratch:
            built = Path(scratch) / path.name
            run = [*command, "-o", str(built), str(_HERE / source)]
            subprocess.run(run, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(_keep(built, path)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{source} of qalora_kernels cannot be compiled, plain PyTorch runs instead, several "
            f"times slower on the CPU. Install gcc, or set QALORA_BACKEND=torch to choose this "
            f"without a warning. Reason: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
