"""The command for GPU machines runs all its stages on the CPU, and goes on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "gpu_run.py"


def rehearse(out, *options):
    # the wheels of a GPU machine are not for this one
    command = [sys.executable, str(RUN), str(out), "--rehearse", "--wheels", str(out / "none")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, timeout=600
    )


def test_all_stages_on_the_cpu(tmp_path):
    first = rehearse(tmp_path, "--only", "memcheck")
    assert first.returncode == 0, first.stdout + first.stderr
    done = rehearse(tmp_path)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()[-5000:]
    units = [json.loads(line) for line in (tmp_path / "units.jsonl").read_text().splitlines()]
    assert [unit["exit_status"] for unit in units] == [0] * len(units)
    # what had finished in the first call was not run again
    assert [unit["unit"] for unit in units].count("memcheck") == 1
    results = {unit["unit"]: unit["result"] for unit in units}
    assert " passed" in results["kernel tests"] and " passed" in results["memcheck"]

    rows = {
        stage: [json.loads(line) for line in (tmp_path / f"stage{stage}.jsonl").open()]
        for stage in (2, 3, 4)
    }
    for row in (row for stage in rows.values() for row in stage):
        assert {"run", "device", "torch", "commit", "operator"} <= row.keys()
    timed = {(row["operator"], row.get("variant")) for row in rows[2] if "seconds_median" in row}
    assert {("linear", "qalora"), ("linear", "dense"), ("linear", "tinygemm")} <= timed
    for operator in ("decoder layer", "linears of the layer"):
        assert {(operator, variant) for variant in ("qalora", "frozen", "lora")} <= timed
    trained = {row["variant"]: row for row in rows[3] if "tokens_per_second_median" in row}
    assert trained.keys() == {"qalora", "lora"}
    for row in trained.values():
        assert row["peak_bytes"] > 0 and row["peak_over_plan"] > 0
        assert row["without_gradient"] == [] and row["last_loss"] < row["first_loss"]
    measured = {row["operator"] for row in rows[4] if "seconds_median" in row}
    assert {"linear", "dequantize", "pooled_grad", "linear forward+backward, r=64"} <= measured
    assert "gemlite" in {row.get("variant") for row in rows[4]}

    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("REHEARSAL on the CPU")
    for bound in (
        "bare bf16 products",
        "faster than tinygemm",
        "faster than 4 bits",
        "QLoRA's tokens",
    ):
        assert bound in summary
    assert "failed: none" in summary


def test_what_finds_no_time_is_named_and_left_for_the_next_call(tmp_path):
    done = rehearse(tmp_path, "--stage", "1", "--budget", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no time left for: ['kernel tests', 'memcheck']" in done.stdout
    assert not (tmp_path / "units.jsonl").exists()


def test_a_failing_unit_is_reported_and_run_again(tmp_path):
    """A data file that cannot be written."""
    options = ("--only", "decoder layer 32")
    (tmp_path / "stage2.jsonl").symlink_to(tmp_path / "missing" / "stage2.jsonl")
    done = rehearse(tmp_path, *options)
    assert done.returncode == 1
    assert "failed: ['decoder layer 32']" in done.stdout
    (tmp_path / "stage2.jsonl").unlink()
    assert rehearse(tmp_path, *options).returncode == 0
