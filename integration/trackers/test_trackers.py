"""Our figures reach TensorBoard, trackio and wandb in a real run, which asks no other machine."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def stored(env_python, run_python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    [packages] = env_python("trackers").parents[1].glob("lib/python*/site-packages")
    environment = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "TRACKIO_DIR": folder / "trackio",
        "WANDB_MODE": "offline",
        "WANDB_DIR": folder,
        "HOME": folder,  # where they keep their settings
    }
    run_python(sys.executable, HERE / "train.py", packages, folder, **environment)
    return json.loads((folder / "stored.json").read_text())


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_has_our_figures(tracker, stored):
    found = stored[tracker]
    assert "train/qalora/offset_change" in found, sorted(found)
    mean, largest = (found[f"train/qalora/offset_change{part}"] for part in ("", "_max"))
    assert len(mean) == len(found["train/loss"]) == 3
    assert 0 < mean[0] < mean[1] < mean[2]
    assert all(one <= most for one, most in zip(mean, largest, strict=True))
    layers = [name for name in found if name.startswith("train/qalora/offset_change/layers.")]
    assert len(layers) == 28
    assert sum(found[name][-1] for name in layers) / 28 == pytest.approx(mean[-1], rel=1e-3)


def test_no_other_machine_is_asked(stored):
    assert stored["asked"] == []
