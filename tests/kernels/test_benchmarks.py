"""The benchmark scripts run, measure what they say, and name what they cannot run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qalora_kernels import QuantSpec
from qalora_plugin.layers.linear import QuantLinear

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
TINY_STEP = {
    "device": "cpu",
    "threads": 1,
    "bits": 4,
    "group_size": 32,
    "r": 4,
    "hidden": 64,
    "intermediate": 96,
    "layers": 1,
    "heads": 2,
    "vocab": 32,
    "batch": 2,
    "sequence": 16,
}


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_operators_beside_their_peers(monkeypatch):
    import operators

    monkeypatch.setattr(operators, "ROTATION", {"cpu": 1})
    limits = {"copy_bytes_per_s": 1e9, "gemm_flop_per_s": 1e9}
    rows = list(operators.run((64, 96), 4, 32, [1, 8], 4, 3, "cpu", limits))
    timed = {(r["operator"], r["variant"], r["M"]): r for r in rows if "seconds_median" in r}
    for m in (1, 8):
        assert {("linear", "qalora", m), ("linear", "dense", m)} <= timed.keys()
    assert ("dequantize", "qalora", 1) in timed and ("fold", "qalora", 1) in timed
    for operator in ("pool", "grad_input", "pooled_grad", "weighted_group_grad"):
        assert (operator, "qalora", 8) in timed
    assert ("linear forward+backward, r=4", "lora", 8) in timed
    for row in timed.values():
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    # 4 bits an input, and the scales and offsets of 2 groups
    held = QuantLinear(QuantSpec(4, 32, 64, 96), device="meta")
    grids = 2 * 96 * (held.scales.element_size() + held.offsets.element_size())
    packed, activations = 64 * 96 // 2 + grids, (64 + 96) * 2
    assert timed["linear", "qalora", 1]["bytes_moved"] == packed + activations
    assert timed["linear", "dense", 1]["bytes_moved"] == 64 * 96 * 2 + activations
    missing = {row["variant"]: row["not_run"] for row in rows if "not_run" in row}
    if not torch.cuda.is_available():
        assert missing["gemlite"] in ("CUDA only", "gemlite is not installed")
    for peer in operators.PEERS:
        assert peer in missing or ("linear", peer, 8) in timed


def test_ratios_are_taken_round_by_round():
    import measure

    numbers = measure.ratio([2.0, 40.0, 2.0], [1.0, 20.0, 1.0])
    assert numbers["ratio_min"] == numbers["ratio_median"] == numbers["ratio_max"] == 2.0


@pytest.mark.slow
def test_a_step_in_two_processes(monkeypatch):
    import steps

    monkeypatch.setattr(steps, "PEER_NEEDS", {"qlora_nf4": ("no_such_module", "bare")})
    monkeypatch.setenv("QALORA_ENV_CACHE", "/nonexistent")
    rows = list(steps.run("tiny", TINY_STEP, ["qalora", "lora", "qlora_nf4"], 2))
    by_variant = {row["variant"]: row for row in rows if "variant" in row}
    assert "integration/envs/build.py bare" in by_variant["qlora_nf4"]["not_run"]
    ours, lora = by_variant["qalora"], by_variant["lora"]
    for row in (ours, lora):
        assert "not_run" not in row, row
        assert row["seconds_median"] > 0 and row["peak_bytes"] > row["weight_bytes"]
        assert row["allocated_peak_bytes"] > row["weight_bytes"] + row["saved_bytes"]
        assert 0 < row["adapter_bytes"] < row["weight_bytes"]
    # the adapters are fp32 in one and bf16 in the other, the linear layers 6 bits against 16
    assert ours["saved_bytes"] < lora["saved_bytes"]
    assert [row["ratio"] for row in rows if "ratio" in row] == ["qalora / lora"]


def test_plots_say_what_they_need(tmp_path):
    data = tmp_path / "cpu.jsonl"
    data.write_text("")
    command = [sys.executable, str(BENCHMARKS / "plots.py"), str(data)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "needs matplotlib" in result.stderr or "no rows" in result.stderr


def test_the_data_files_are_rows():
    """Every line says where it comes from, and holds a time, a ratio or a reason."""
    for path in (BENCHMARKS / "results").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {"run", "device", "torch", "commit", "operator"} <= row.keys()
            assert sum(key in row for key in ("seconds_median", "ratio_median", "not_run")) == 1
