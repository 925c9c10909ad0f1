"""Compile the C sources of this directory on first use, and keep the result in the user's cache.

No compiler, no problem: `library` returns None after one warning and the callers use plain PyTorch.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_TIMEOUT = 300  # seconds; a compiler that waits for a licence or a dead mount must not hang us
_COMMON_FLAGS = ("-O2", "-fopenmp", "-fPIC", "-shared")
# torch reports an instruction set only where all of these are there; -march=native could pick
# more, and then a cache on a shared home directory would crash on the neighbouring machine
_INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}


def _machine_flags() -> tuple[str, ...]:
    """Compiler flags for this machine's instruction set; none on one that is not named above."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _INSTRUCTION_SETS.get(capability, ())
    products_of_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if capability == "AVX512" and products_of_bf16 is not None and products_of_bf16():
        flags = (*flags, "-mavx512bf16")
    return flags


def _compiler() -> list[str]:
    """The command that `CC` names, else cc or gcc; empty where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    found = shutil.which("cc") or shutil.which("gcc")
    return named or ([found] if found else [])


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qalora-plugin" / "cpu"


def _is_writable(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK)


def _compile(command: list[str], source: Path, target: Path) -> ctypes.CDLL:
    """Compile to `target` by way of a rename; to a temporary file where it cannot be written.

    Raises:
        OSError: no compiler, or what it made does not load.
        subprocess.SubprocessError: it failed.
    """
    writable = _is_writable(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent if writable else None) as scratch:
        built = Path(scratch) / target.name
        run = [*command, "-o", str(built), str(source)]
        subprocess.run(run, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        if not writable:
            return ctypes.CDLL(str(built))  # stays loaded when the file is gone
        os.replace(built, target)
    return ctypes.CDLL(str(target))


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
    command = [*compiler, *_COMMON_FLAGS, *_machine_flags(), *flags]
    text = (_HERE / "layer.h").read_bytes() + (_HERE / source).read_bytes()
    digest = hashlib.sha256(text + " ".join([*command, platform.machine()]).encode()).hexdigest()
    path = _cache_dir() / f"{Path(source).stem}-{digest[:16]}.so"
    try:
        if path.exists():
            return ctypes.CDLL(str(path))
        if not compiler:
            raise OSError("no C compiler found (cc or gcc, or the one that CC names)")
        return _compile(command, _HERE / source, path)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{source} of qalora_kernels cannot be compiled, plain PyTorch runs instead, several "
            f"times slower on the CPU. Install gcc, or set QALORA_BACKEND=torch to choose this "
            f"without a warning. Reason: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
