"""Training on several ranks with the real TRL, Accelerate and DeepSpeed, on CPU ranks over gloo."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BASE = ROOT / "qalora_plugin" / "quickstart" / "base_model"
SHARDED = ("zero2", "zero3", "zero3_offload", "fsdp2")
LIMIT = 120  # seconds in which the other ranks must have stopped
Found = dict[str, Any]


@pytest.fixture(scope="session")
def run_script(env_python, run_json, project_path):
    """`run_script(name, *arguments)` -> the last line that a script of this folder prints."""
    python, path = env_python("axolotl"), f"{project_path}:{ROOT / 'tests'}"
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "PASSIVE"}
    # as for integration/axolotl: another ninja would compile DeepSpeed's C++ again, for a minute
    environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"

    def run(script, *arguments):
        return run_json(python, HERE / script, *arguments, timeout=900, **environment)

    return run


@pytest.fixture(scope="session")
def driven(run_script, tmp_path_factory):
    """What each step of drive.py found."""
    return run_script("drive.py", BASE, tmp_path_factory.mktemp("distributed"))


def step(driven, name):
    found = driven[name]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("mode", SHARDED)
def test_every_mode_trains_the_adapter_of_one_rank(driven, mode):
    """20 steps of AdamW in fp32 on the same rows: within 1e-5 of the whole adapter's norm.

    Single elements differ more: where a gradient is as small as the rounding of the sum over rows,
    Adam divides it by its own size.
    """
    found = step(driven, "straight")
    assert found[mode]["ranks"] == 2
    assert found[mode]["kind"] == ("FSDP" if mode == "fsdp2" else "DEEPSPEED")
    assert found[mode]["difference"] < 1e-5
    losses = zip(found["one"]["losses"], found[mode]["losses"], strict=True)
    assert all(abs(one - two) < 1e-5 * one for one, two in losses)
    assert found["one"]["losses"][-1] < 0.97 * found["one"]["losses"][0]
    assert found[mode]["layers"] == 28  # verified, merged


@pytest.mark.parametrize("mode", ["ddp", "zero3", "fsdp2"])
def test_a_mixture_trains_the_adapter_of_one_rank(driven, mode):
    """Each rank sends its own tokens to its own experts: none waits for another for ever."""
    found = step(driven, "mixtures")
    assert found[mode]["ranks"] == 2
    assert found[mode]["difference"] < 1e-5
    assert found[mode]["layers"] == 56  # verified, merged


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_merging_after_sharded_training_writes_the_same_bytes(driven, mode):
    found = step(driven, "same_bytes")[mode]
    assert {"model.safetensors", "config.json", "qalora_manifest.json"} <= set(found["names"])
    assert found["again"] == found["names"]
    assert found["different"] == []


def test_killed_and_resumed_on_one_rank_is_bit_equal(driven):
    found = step(driven, "resumed")["one"]
    before, after = found["losses"]
    assert len(before) == 20
    assert before == after
    assert found["adapter"] == found["optimizer"] == 0


@pytest.mark.parametrize("mode", SHARDED)
def test_killed_and_resumed_on_two_ranks(driven, mode):
    found = step(driven, "resumed")[mode]
    before, after = found["losses"]
    assert all(abs(one - two) <= 1e-6 * one for one, two in zip(before, after, strict=True))
    assert found["adapter"] < 1e-6
    assert found["optimizer"] < 1e-6
    assert found["layers"] == 28


@pytest.mark.parametrize("mode", SHARDED)
def test_a_rank_killed_in_training_stops_the_other(driven, mode):
    """Gloo notices it, without any launcher."""
    found = step(driven, "resumed")[mode]["killed"]
    check_stopped(found, killed=1)
    assert "merged" not in found["left"]


def check_stopped(ended, killed):
    """One of two ranks was killed, and the other stopped in time."""
    assert ended["codes"][killed] == -signal.SIGKILL
    assert ended["codes"][1 - killed] == 1
    assert ended["hung"] == []
    assert ended["seconds_after_kill"] < LIMIT


def test_rank_0_killed_in_the_merge(driven):
    found = step(driven, "killed_merge")
    check_stopped(found, killed=0)
    assert "RankError: rank 0 stopped" in found["logs"][1]
    assert "while it was merging" in found["logs"][1]
    assert "adapter" in found["left"]
    assert "merged" not in found["left"]
    assert found["layers"] == 28  # merged when it was run again
    assert [name for name in found["after"] if "merged" in name] == ["merged"]


def test_checkpoints_on_another_number_of_ranks(driven):
    """FSDP2's can be resumed, ZeRO's not; any adapter is a warm start."""
    found = step(driven, "other_ranks")
    assert found["fsdp2"]["resumed"], found["fsdp2"]["log"]
    for mode in ("zero2", "zero3"):
        assert not found[mode]["resumed"]
        assert "world size" in found[mode]["log"].lower()
    assert found["warm"][0] < found["cold"][0]


@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_resumed_beside_a_reference_the_policy_goes_on(driven, mode):
    """DeepSpeed and FSDP load the adapter in training from files of their own."""
    found = step(driven, "references")[mode]
    assert found["difference"] < 1e-6 < 1e-3 < found["second_half"]
    assert found["layers"] == 28


@pytest.mark.parametrize("base", ["dense", "stock"])
@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_other_bases(driven, base, mode):
    """Quantized while it loads, and stock GPTQ with act-order: the same as on one rank."""
    found = step(driven, "other_bases")
    one, two = found[f"{base}-ddp"], found[f"{base}-{mode}"]
    assert two["left"] == one["left"]
    assert "merged" in one["left"]
    assert two["fingerprint"] == one["fingerprint"] is not None
    assert all(abs(a - b) < 1e-5 for a, b in zip(one["losses"], two["losses"], strict=True))


def check_memory(ranks):
    """What a rank holds of the quantized layers is its part of them."""
    (alone,) = ranks["1"]
    assert alone["whole"] == 0
    for count, parts in ranks.items():
        assert len(parts) == int(count)
        for part in parts:
            assert part["whole"] == 0
            assert part["sharded"] <= 1.01 * alone["sharded"] / int(count)


def test_memory_of_a_rank_falls_with_their_number(run_script, tmp_path):
    found = run_script("memory.py", tmp_path / "memory.json", 2, 1, 2)
    check_memory(found["ranks"])
    assert json.loads((tmp_path / "memory.json").read_text()) == found


def test_committed_measurement():
    """What docs/multi_gpu.md states."""
    found = json.loads((HERE / "results" / "memory.json").read_text())
    check_memory(found["ranks"])
    resident = {
        count: max(part["loaded"] - part["before"] for part in parts)
        for count, parts in found["ranks"].items()
    }
    assert resident["2"] < 0.7 * resident["1"]
    assert resident["4"] < 0.7 * resident["2"]
