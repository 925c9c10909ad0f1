"""Build, or find in the cache, the virtual environment of one peer system.

    python integration/envs/build.py gptqmodel     -> prints the path of its python

An environment is described by `NAME.txt` and, where there are such files, by

    NAME.no-isolation.txt   packages whose build must see what is already installed
                            (`pip install --no-build-isolation`)
    NAME.uninstall.txt      packages that are removed again
    NAME.metadata.txt       distributions (name==version) of which only the metadata is made

It lives under `${QALORA_ENV_CACHE:-~/.cache/qalora-plugin/envs}/NAME-py<version>-<hash>`; the hash
covers these files and those that they include. Standard library only.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAMP = "built-in-seconds"
UNUSED_AFTER = 24 * 3600  # seconds; another checkout may be running in an older environment


def names():
    """Return the names of the environments that can be built."""
    return sorted(p.stem for p in HERE.glob("*.txt") if "." not in p.stem)


def cache_dir():
    """Return the directory that holds the environments."""
    if own := os.environ.get("QALORA_ENV_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "qalora-plugin" / "envs"


def requirement_files(name):
    """Return the requirement files of `name`, in the order of installation."""
    files = [HERE / f"{name}.txt", HERE / f"{name}.no-isolation.txt"]
    return [f for f in files if f.exists()]


def listed(name, kind):
    """Return the lines of `NAME.KIND.txt` without comments; none where there is no such file."""
    path = HERE / f"{name}.{kind}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def contents(path):
    """Return the text of a requirement file with that of the files it includes (`-r`, `-c`)."""
    text = path.read_text()
    for included in re.findall(r"^-[rc]\s+(\S+)", text, flags=re.MULTILINE):
        text += contents((path.parent / included).resolve())
    return text


def environment_dir(name):
    """Return the directory of the environment `name` for this interpreter's version."""
    text = "".join(contents(f) for f in requirement_files(name))
    for kind in ("uninstall", "metadata"):
        text += "".join(f"{kind} {line}\n" for line in listed(name, kind))
    digest = hashlib.sha256(text.encode())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return cache_dir() / f"{name}-py{version}-{digest.hexdigest()[:12]}"


def install(name, directory):
    """Create the virtual environment in `directory`; raises CalledProcessError."""
    venv.create(directory, with_pip=True, symlinks=True)
    pip = [directory / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check"]
    # Compiling CUDA extensions is what makes these packages slow or impossible to build.
    environment = {**os.environ, "BUILD_CUDA_EXT": "0", "DS_BUILD_OPS": "0"}
    for requirements in requirement_files(name):
        isolation = ["--no-build-isolation"] if "no-isolation" in requirements.name else []
        command = [*pip, "--quiet", *isolation, "-r", requirements]
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
    if unwanted := listed(name, "uninstall"):
        uninstall = [*pip[:3], "uninstall", "--quiet", "--yes", *unwanted]
        subprocess.run(uninstall, check=True, stdout=sys.stderr)
    for line in listed(name, "metadata"):
        add_metadata(directory, *line.split("=="))


def add_metadata(directory, distribution, version):
    """Make the metadata of a distribution that is not installed, for those who ask its version."""
    (packages,) = directory.glob("lib/python*/site-packages")
    folder = packages / f"{distribution}-{version}.dist-info"
    folder.mkdir()
    text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)


def remove_unused(keep, name):
    """Remove environments of `name` with other requirements that nothing used for a day."""
    prefix = keep.name.rpartition("-")[0]
    for other in keep.parent.glob(f"{prefix}-*"):
        stamp = other / STAMP
        used = stamp.stat().st_mtime if stamp.exists() else 0.0
        if other != keep and other.is_dir() and time.time() - used > UNUSED_AFTER:
            shutil.rmtree(other)


def build(name):
    """Return the interpreter of environment `name`, building the environment if it is missing.

    A virtual environment cannot be renamed, so its stamp is written last: without one it is a
    build that was cut short, and is made again. Only one process builds `name` at a time.
    """
    directory = environment_dir(name)
    stamp, python = directory / STAMP, directory / "bin" / "python"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            shutil.rmtree(directory, ignore_errors=True)
            print(f"Building the environment '{name}' in {directory} ...", file=sys.stderr)
            start = time.monotonic()
            install(name, directory)
            stamp.write_text(f"{time.monotonic() - start:.0f}\n")
        stamp.touch()
        remove_unused(directory, name)
    return python


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=names())
    try:
        print(build(parser.parse_args().name))
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip failed with exit status {error.returncode}")
