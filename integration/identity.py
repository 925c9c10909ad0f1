"""Hash every file that the quickstart and the exports write, to compare two checkouts.

    python integration/identity.py CHECKOUT > before.txt
    python integration/identity.py OTHER_CHECKOUT > after.txt
    diff before.txt after.txt

Same seeds, same data, one thread: a change that should not touch the numbers gives the same hashes.
Exports are written in the environment `export` (integration/envs/build.py), which has the libraries
of all formats.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    "quickstart --model embedded --steps 12 --out run",
    "export run/merged --format gguf --out exports/model.gguf",
    "export run/merged --format mlx --out exports/mlx",
    "export run/merged --format onnx --out exports/onnx",
    "export run/merged --format torchao --out exports/torchao",
    "export run/adapter --format lora --out exports/lora",
    "quantize MODEL --out stock --method rtn --bits 3 --format gptq_v2",
    "quantize MODEL --out integer --method rtn --zero-points integer --override *.q_proj=bits:8",
    "export stock --format gptq --checkpoint-format gptq_v2 --out exports/gptq",
)


def run(command, python, checkout, work):
    """Run one `qalora` command with the code of `checkout`; its output goes to stderr."""
    model = str(checkout / "qalora_plugin" / "quickstart" / "base_model")
    arguments = [model if word == "MODEL" else word for word in command.split()]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(
        [python, "-m", "qalora_plugin", *arguments],
        check=True,
        cwd=work,
        env=environment,
        stdout=sys.stderr,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout.resolve()
    builder = Path(__file__).parent / "envs" / "build.py"
    built = subprocess.run([sys.executable, builder, "export"], stdout=subprocess.PIPE, check=True)
    exporting = built.stdout.decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for command in COMMANDS:
            python = exporting if command.startswith("export") else sys.executable
            run(command, python, checkout, work)
        files = [path for path in work.rglob("*") if path.is_file()]
        # a report says how long a run took
        for path in sorted(path for path in files if path.stem != "report"):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            print(f"{digest}  {path.relative_to(work)}", flush=True)


if __name__ == "__main__":
    main()
