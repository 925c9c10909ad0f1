"""The benchmark scripts measure what they say, and name what they cannot run."""

import json
from pathlib import Path

import pytest

from qalora_kernels import QuantSpec

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


def settings(**changes):
    import operators

    limits = {"copy_bytes_per_s": 1e9, "gemm_flop_per_s": 1e9}
    given = {"device": "cpu", "limits": limits, "rounds": 3, "rank": 4, "peers": ["tinygemm"]}
    return operators.Settings(**given | changes)


def test_operators_beside_their_peers(monkeypatch):
    import operators

    monkeypatch.setattr(operators, "ROTATION", {"cpu": 1})
    spec = QuantSpec(4, 32, 64, 96)
    rows = list(operators.run(spec, [1, 8], settings()))
    timed = {(r["operator"], r["variant"], r["M"]): r for r in rows if "seconds_median" in r}
    for m in (1, 8):
        assert {("linear", v, m) for v in ("qalora", "dense", "tinygemm")} <= timed.keys()
    assert ("dequantize", "qalora", 1) in timed and ("fold", "qalora", 1) in timed
    for operator in ("pool", "grad_input", "pooled_grad", "weighted_group_grad"):
        assert (operator, "qalora", 8) in timed
    assert ("linear forward+backward, r=4", "lora", 8) in timed
    for row in timed.values():
        assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    # 4 bits an input, and the scales and offsets of 2 groups
    grids = 2 * 96 * (spec.scales_dtype.itemsize + spec.offsets_dtype.itemsize)
    packed, activations = 64 * 96 // 2 + grids, (64 + 96) * 2
    assert timed["linear", "qalora", 1]["bytes_moved"] == packed + activations
    assert timed["linear", "dense", 1]["bytes_moved"] == 64 * 96 * 2 + activations


def test_a_peer_that_cannot_run_is_a_row_with_the_reason(monkeypatch):
    import operators

    monkeypatch.setattr(operators, "ROTATION", {"cpu": 1})
    spec = QuantSpec(3, 32, 64, 96)
    rows = list(operators.run(spec, [8], settings(only_linear=True)))
    assert {(row["operator"], row["timing"]) for row in rows} == {("linear", "graph")}
    missing = {row["variant"]: row["not_run"] for row in rows if "not_run" in row}
    assert missing == {"tinygemm": "NotImplementedError: 4 bits only"}
    assert [row["ratio"] for row in rows if "ratio" in row] == ["qalora / dense"]


def test_ratios_are_taken_round_by_round():
    import measure

    (row,) = measure.ratios({}, {"qalora": [2.0, 40.0, 2.0], "lora": [1.0, 20.0, 1.0]})
    assert row["ratio"] == "qalora / lora"
    assert row["ratio_min"] == row["ratio_median"] == row["ratio_max"] == 2.0


@pytest.mark.slow
def test_a_step_in_two_processes(monkeypatch):
    import training

    monkeypatch.setattr(training, "PEER_NEEDS", {"qlora_nf4": ("no_such_module", "bare")})
    monkeypatch.setenv("QALORA_ENV_CACHE", "/nonexistent")
    rows = list(training.steps("tiny", TINY_STEP, ["qalora", "lora", "qlora_nf4"], 2))
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


def test_training_without_a_gradient_or_a_falling_loss_fails_after_its_rows(monkeypatch):
    import training
    import worker

    class Trained:
        """What a run of SFTTrainer answers."""

        def __init__(self, variant, spec):
            if variant == "qlora_nf4":
                raise training.Unavailable("no bitsandbytes")
            last = 4.0 if variant == "lora" else 2.0
            missing = ["q_proj.lora_A"] * (variant == "qalora")
            self.ready = {"seconds": [1.0, 2.0], "first_loss": 3.0, "last_loss": last}
            self.ready |= {"without_gradient": missing, "peak_bytes": 6}

        def close(self):
            pass

    monkeypatch.setattr(training, "Worker", Trained)
    monkeypatch.setattr(training, "planned_bytes", lambda *_: {"qalora": 5, "lora": 5})
    monkeypatch.setattr(worker.LlamaForCausalLM, "save_pretrained", lambda *_: None)
    rows = []
    with pytest.raises(SystemExit) as failure:
        for row in training.sft("tiny", TINY_STEP, ["qalora", "lora", "qlora_nf4"], 2):
            rows.append(row)
    message = str(failure.value)
    assert "qalora: no gradient reaches ['q_proj.lora_A']" in message
    assert "lora: loss 3.0, then 4.0" in message
    by_variant = {row["variant"]: row for row in rows if "variant" in row}
    assert by_variant["qalora"]["tokens_per_second_median"] == 24.0  # 32 in 1 s and in 2 s
    assert by_variant["qalora"]["peak_over_plan"] == 1.2
    assert by_variant["qlora_nf4"]["not_run"] == "no bitsandbytes"
    assert rows[-1]["ratio"] == "qalora / lora" and rows[-1]["ratio_median"] == 1.0


def test_the_data_files_are_rows():
    """Every line says where it comes from, and holds a time, a ratio or a reason."""
    for path in (BENCHMARKS / "results").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert {"run", "device", "torch", "commit", "operator"} <= row.keys()
            assert sum(key in row for key in ("seconds_median", "ratio_median", "not_run")) == 1


def test_plots_show_the_newest_run_of_each_step():
    import plots

    rows = plots.newest_runs(BENCHMARKS / "results" / "cpu.jsonl")
    assert {row["operator"].split(", ")[-1] for (row, *_) in rows} == {"16 x 128", "4 x 512"}
    for of_step in rows:
        assert len({row["run"] for row in of_step}) == 1
        assert {row["variant"] for row in of_step} == plots.LABELS.keys()
        times = [row["seconds_median"] for row in of_step]
        assert times == sorted(times)
