"""Compile the C sources of this directory on first use, and keep the result in the user's cache.

No compiler, no problem: `library` returns None after one warning and the callers use plain PyTorch.
A kept library runs with the user's rights, so it is loaded only from a directory and a file that no
other user can have written, and only with the content that was stored: a torn one would load, and
kill the process when a missing page is touched.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from ... import cache

_HERE = Path(__file__).parent
_TIMEOUT = 300  # seconds; a compiler that waits for a licence or a dead mount must not hang us
_COMMON_FLAGS = ("-O2", "-fopenmp", "-fPIC", "-shared")
# torch reports an instruction set only where all of these are there; -march=native could pick
# more, and then a cache on a shared home directory would crash on the neighbouring machine
_INSTRUCTION_SETS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
_logger = logging.getLogger(__name__)


def _machine_flags() -> tuple[str, ...]:
    """Return flags for this machine's instruction set; none on one that is not named above."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = _INSTRUCTION_SETS.get(capability, ())
    products_of_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if capability == "AVX512" and products_of_bf16 is not None and products_of_bf16():
        flags = (*flags, "-mavx512bf16")
    return flags


def _compiler() -> list[str]:
    """Return the command that `CC` names, else cc or gcc.

    Raises:
        OSError: there is none.
        ValueError: `CC` has a quotation mark that is not closed.
    """
    named = shlex.split(os.environ.get("CC", ""))
    found = shutil.which("cc") or shutil.which("gcc")
    if not named and not found:
        raise OSError("no C compiler found (cc or gcc, or the one that CC names)")
    return named or [str(found)]


def _kept_at(name: str) -> Path | None:
    """Return where a library is kept, or None where none can be."""
    try:
        return cache.private_directory("cpu") / name
    except OSError as error:
        _logger.warning("compiled C code is not kept, every process compiles anew: %s", error)
        return None


def _load(kept: Path) -> ctypes.CDLL | None:
    """Load what `_keep` wrote; None where it is missing, damaged or not ours."""
    try:
        digest = hashlib.sha256(cache.read_own(kept)).hexdigest()
        whole = cache.read_own(kept.with_suffix(".sha256")) == digest.encode()
        return ctypes.CDLL(str(kept)) if whole else None
    except OSError:
        return None


def _keep(data: bytes, kept: Path) -> None:
    """Write a library to the cache, its hash beside it; that it is not kept stops nobody."""
    try:
        cache.write(kept, data)
        cache.write(kept.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode())
    except OSError as error:
        _logger.warning("compiled C code is not kept, every process compiles anew: %s", error)


def _load_or_compile(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Return a compiled source from the cache, or compile it; errors as `library` says."""
    command = [*_compiler(), *_COMMON_FLAGS, *_machine_flags(), *flags]
    text = (_HERE / "layer.h").read_bytes() + source.read_bytes()
    digest = hashlib.sha256(text + " ".join([*command, platform.machine()]).encode()).hexdigest()
    kept = _kept_at(f"{source.stem}-{digest[:16]}.so")
    loaded = None if kept is None else _load(kept)
    if loaded is not None:
        return loaded
    with tempfile.TemporaryDirectory() as scratch:  # of a random name, mode 0700
        built = Path(scratch) / f"{source.stem}.so"
        run = [*command, "-o", str(built), str(source)]
        subprocess.run(run, check=True, capture_output=True, text=True, timeout=_TIMEOUT)
        if kept is not None:
            _keep(built.read_bytes(), kept)
            loaded = _load(kept)
        return loaded or ctypes.CDLL(str(built))  # stays loaded when the file is gone


@functools.cache
def library(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """Return the compiled `source`, a file of this directory.

    Args:
        source: name of the C file.
        flags: compiler flags of this file, beside those for the machine.

    Returns:
        The loaded library, or None where it cannot be had: there is no C compiler (of `CC`, `cc`,
        `gcc`), it fails, or its output does not load. A RuntimeWarning then says so, once.
    """
    try:
        return _load_or_compile(_HERE / source, flags)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{source} of qalora_kernels cannot be compiled, plain PyTorch runs instead, several "
            f"times slower on the CPU. Install gcc, or set QALORA_BACKEND=torch to choose this "
            f"without a warning. Reason: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
