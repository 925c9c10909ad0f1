"""Download what a GPU machine without network lacks, as wheels for its Python; run where pip works.

    python kernels/benchmarks/carry.py                 into .wheels/, which git ignores
    python kernels/benchmarks/carry.py --limit 40      MiB; what does not fit is left out by name

torch, triton and transformers are never carried: those of the machine are measured. Dependencies
are not followed (`--no-deps`): PACKAGES lists those that such a machine was seen to lack. Beside
the wheels: commit.txt, the commit of this checkout, since the machine may have no git.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gpu_run import COMMIT_FILE, WHEELS
from measure import commit

ROOT = Path(__file__).resolve().parents[2]
# the most wanted first: the last ones are left out where room is short. pytest, accelerate and the
# rest are on such machines; PEFT is too, in a version that nobody chose.
PACKAGES = ["peft", "datasets", "dill", "multiprocess", "trl", "bitsandbytes", "gemlite"]
PURE_SOURCES = ["gemlite"]  # published as sources only; a wheel of them is the same everywhere
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)


def pinned(package: str) -> str:
    """`package==version` where constraints.txt has one."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pin = re.search(rf"^{re.escape(package)}==\S+", text, flags=re.MULTILINE | re.IGNORECASE)
    return pin[0] if pin else package


def download(package: str, python: str, directory: Path) -> Path:
    """One wheel.

    Raises:
        subprocess.CalledProcessError: pip finds none; its message has been printed.
    """
    before = set(directory.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    where = ["--quiet", "--no-deps"]
    if package in PURE_SOURCES:
        command = [*pip, "wheel", *where, "--wheel-dir", str(directory), pinned(package)]
    else:
        target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        for version in GLIBC:
            target += ["--platform", f"manylinux_2_{version}_x86_64"]
        target += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
        command = [*pip, "download", *where, *target, "--dest", str(directory), pinned(package)]
    subprocess.run(command, check=True)
    (wheel,) = set(directory.glob("*.whl")) - before
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
        names = old.namelist()
        if not any(wanted in name for name in names):
            libraries = sorted(name for name in names if library.search(name))
            sys.exit(f"{wheel.name} has no {wanted}so; give one of these as --cuda: {libraries}")
        dropped = {name for name in names if library.search(name) and wanted not in name}
        for name in names:
            if name in dropped:
                continue
            data = old.read(name)
            if name.endswith(".dist-info/RECORD"):
                lines = data.decode().splitlines(keepends=True)
                data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
            new.writestr(old.getinfo(name), data)
    slim.replace(wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", default=WHEELS)
    parser.add_argument("--limit", type=float, default=48, help="MiB for all wheels together")
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    parser.add_argument("--cuda", default="130", help="of the GPU machine's torch, without a dot")
    arguments = parser.parse_args()
    directory = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.whl"):
        old.unlink()
    room = arguments.limit * 2**20
    left_out = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                wheel = download(package, arguments.python, Path(scratch))
            except subprocess.CalledProcessError:
                left_out.append(f"{package} (pip has no wheel of it)")
                continue
            if package == "bitsandbytes":
                keep_cuda(wheel, arguments.cuda)
            size = wheel.stat().st_size
            if size > room:
                left_out.append(f"{package} ({size / 2**20:.1f} MiB, {room / 2**20:.1f} left)")
                continue
            room -= size
            (directory / wheel.name).write_bytes(wheel.read_bytes())
            print(f"{size / 2**20:7.2f} MiB  {wheel.name}")
    (directory / COMMIT_FILE).write_text(commit() + "\n", encoding="utf-8")
    used = arguments.limit - room / 2**20
    print(f"{used:7.2f} MiB in {directory}; left out: {', '.join(left_out) or 'nothing'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
