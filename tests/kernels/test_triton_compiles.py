"""The kernels compile to machine code for real GPUs, which refuse what the interpreter accepts."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


def compile_with(runs, cache):
    """What `compile_for_gpu.py` says of each kernel; the runs go on at the same time."""
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this build of triton has no NVIDIA compiler")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    script = Path(__file__).with_name("compile_for_gpu.py")

    def run(arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(run, runs))
    assert not any(each.returncode for each in done), [each.stderr[-4000:] for each in done]
    return [json.loads(line) for each in done for line in each.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "bits"),
    [
        ("90", ["4"]),
        pytest.param("80", ["2", "3"], marks=pytest.mark.slow),
        pytest.param("90", ["2", "3", "8"], marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles(capability, bits, tmp_path):
    compiled = compile_with([[capability, each] for each in bits], tmp_path)
    kernels = {line["kernel"] for line in compiled}
    assert kernels == {
        "_dequantize_kernel",
        "_linear_kernel",
        "_grad_input_kernel",
        "_sum_splits_kernel",
        "_pool_kernel",
        "_weighted_group_grad_kernel",
    }
    products = {"_grad_input_kernel", "_weighted_group_grad_kernel"}
    unit = "wgmma" if capability == "90" else "mma"
    for line in compiled:
        assert line["machine_code"]
        assert not line["local_memory"], line  # registers spilled by Triton's own doing
        assert line["shared"] < 160 * 1024, line  # what an A100 gives to one program
        if line["kernel"] in products:
            assert line[unit], line


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "of"), [("3", 16), ("4", 2)])  # 3 bits take 5 times as long
def test_candidates_of_tuning_compile_for_hopper(bits, of, tmp_path):
    halves = [[f"candidates:{first}/{of}", "90", bits] for first in (0, 1)]
    compiled = compile_with(halves, tmp_path)
    assert {line["plan"]["op"] for line in compiled} == {"linear", "grad_input"}
    for line in compiled:
        if line["plan"]["block_m"] > 1 and line["kernel"] != "_sum_splits_kernel":
            assert line["wgmma"], line
        assert line["shared"] <= 227 * 1024, line  # what an H100 or H200 gives to one program
