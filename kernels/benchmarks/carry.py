"""Download what a GPU machine without network lacks, as wheels for its Python; run where pip works.

    python kernels/benchmarks/carry.py                 into .wheels/, which git ignores

torch, triton and transformers are those of the machine. Dependencies are not followed: PACKAGES
lists what such a machine was seen to lack. commit.txt, beside the wheels, stands in for git there.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu_run import COMMIT_FILE, ROOT, WHEELS
from measure import commit

# such a machine has a PEFT of its own, in a version that nobody chose
PACKAGES = ["peft", "datasets", "dill", "multiprocess", "trl", "bitsandbytes", "gemlite"]
PURE_SOURCES = ["gemlite"]  # published as sources only; a wheel of them is the same everywhere
PLATFORMS = [f"manylinux_2_{version}" for version in (39, 35, 34, 31, 28, 27, 24, 17)]
PLATFORMS += ["manylinux2014", "manylinux1"]


def download(package: str, python: str, directory: Path) -> Path:
    """Download one wheel, of the version of constraints.txt where that has one.

    Raises:
        subprocess.CalledProcessError: pip finds none; its message has been printed.
    """
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pin = re.search(rf"^{re.escape(package)}==\S+", text, flags=re.MULTILINE | re.IGNORECASE)
    command = ["download", "--dest", str(directory), "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    if package in PURE_SOURCES:
        command = ["wheel", "--wheel-dir", str(directory)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *command]
    subprocess.run([*pip, "--quiet", "--no-deps", pin[0] if pin else package], check=True)
    (wheel,) = directory.glob("*.whl")
    return wheel


def keep_cuda(wheel: Path, cuda: str) -> None:
    """Drop from the bitsandbytes wheel the libraries of other CUDA versions and other devices.

    They are nine tenths of it.

    Raises:
        SystemExit: it has none for this version.
    """
    library = re.compile(r"libbitsandbytes_(cuda|rocm|xpu|hip)\d+\.")
    wanted = f"libbitsandbytes_cuda{cuda}."
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as new:
        libraries = {name for name in old.namelist() if library.search(name)}
        dropped = {name for name in libraries if wanted not in name}
        if dropped == libraries:
            found = sorted(libraries)
            sys.exit(f"{wheel.name} has no {wanted}so; give one of these as --cuda: {found}")
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
            if name not in dropped:
                new.writestr(old.getinfo(name), data)
    slim.replace(wheel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=WHEELS)
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--cuda", default="130", help="of the GPU machine's torch, without a dot")
    a = parser.parse_args()
    a.directory.mkdir(parents=True, exist_ok=True)
    for old in a.directory.glob("*.whl"):
        old.unlink()
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                wheel = download(package, a.python, Path(scratch))
            except subprocess.CalledProcessError:
                print(f"left out, since pip has no wheel of it: {package}")
                continue
            if package == "bitsandbytes":
                keep_cuda(wheel, a.cuda)
            print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
            shutil.copy(wheel, a.directory)
    (a.directory / COMMIT_FILE).write_text(commit() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
