"""A 1.1B-parameter model is quantized and merged in a bounded resident memory."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

QUANTIZE_LIMIT = 2.5e9
MERGE_LIMIT = 1.0e9
RANK = 16


QUANTIZE = """
import sys, torch
from qalora_plugin import quantize_model
ids = torch.randint(0, 32000, (4, 256), generator=torch.Generator().manual_seed(0))
quantize_model(sys.argv[1], sys.argv[2], bits=4, group_size=32, calibration=ids, samples=4,
               seq_len=256)
"""


def run_measured(*args: object) -> tuple[float, float]:
    """Run Python with these arguments; (peak resident bytes, seconds).

    The peak is read while it runs: what `wait4` says of a child is no less than what this process
    had when it started the child.
    """
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, *map(str, args)])
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = [line for line in status.splitlines() if line.startswith("VmHWM")]
        peak = int(found[0].split()[1]) * 1024 if found else peak  # a zombie has none
        time.sleep(0.02)
    assert process.returncode == 0
    return peak, time.monotonic() - started


def write_adapter(base: Path, out: Path) -> None:
    """An adapter of random numbers for every quantized layer, as PEFT lays it out."""
    from qalora_plugin import QALoRAConfig
    from qalora_plugin.files.reader import CheckpointReader

    reader = CheckpointReader(base)
    config = reader.config["quantization_config"]
    tensors = {}
    for name in (n.removesuffix(".qweight") for n in reader.tensors if n.endswith(".qweight")):
        groups, outputs = reader.info(f"{name}.scales").shape
        key = f"base_model.model.{name}"
        tensors[f"{key}.qalora_A.weight"] = torch.randn(RANK, groups) * 1e-2
        tensors[f"{key}.qalora_B.weight"] = torch.randn(outputs, RANK) * 1e-2
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    QALoRAConfig(
        r=RANK,
        lora_alpha=RANK,
        base_model_name_or_path=str(base),
        bits=config["bits"],
        group_size=config["group_size"],
        fingerprint=config["base"]["fingerprint"],
    ).save_pretrained(out)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_1b_is_quantized_and_merged_in_bounded_memory(tmp_path: Path, llama_1b: Path) -> None:
    quantized = tmp_path / "int4"
    quantize_peak, quantize_seconds = run_measured("-c", QUANTIZE, llama_1b, quantized)
    write_adapter(quantized, tmp_path / "adapter")
    merge_peak, merge_seconds = run_measured(
        "-m", "qalora_plugin", "merge", tmp_path / "adapter", "--out", tmp_path / "merged"
    )
    figures = {
        "quantize": {"peak_gb": quantize_peak / 1e9, "seconds": quantize_seconds},
        "merge": {"peak_gb": merge_peak / 1e9, "seconds": merge_seconds},
    }
    print(json.dumps(figures, indent=2))
    assert quantize_peak <= QUANTIZE_LIMIT
    assert merge_peak <= MERGE_LIMIT
