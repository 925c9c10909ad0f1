"""An interrupted run goes on where it stopped and ends in the same bytes."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from support.architectures import save, token_ids

from qalora_plugin.quantize import pipeline
from qalora_plugin.quantize.pipeline import quantize_model

_CHILD = """
import sys, time
import torch
torch.set_num_threads(1)
from qalora_plugin.quantize import walk
from qalora_plugin.quantize.pipeline import quantize_model
leave = walk.Walk.leave
def slow(self, index):
    leave(self, index)
    if index == 1:  # block 1 is written: wait here to be killed
        print("ready", flush=True)
        time.sleep(60)
walk.Walk.leave = slow
ids = torch.randint(0, 90, (2, 12), generator=torch.Generator().manual_seed(1))
quantize_model(sys.argv[1], sys.argv[2], bits=3, group_size=16, calibration=ids, seq_len=12)
"""


def _run(source, out, **kwargs):
    settings = {"bits": 3, "group_size": 16, "calibration": token_ids(), "seq_len": 12}
    return quantize_model(source, out, progress=False, **{**settings, **kwargs})


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def source(tmp_path):
    return save("qwen2", tmp_path / "source")


class _StopError(Exception):
    pass


def _interrupt_after(monkeypatch, blocks):
    """Let the run die when it has written `blocks` blocks."""
    original = pipeline.Walk.leave

    def leave(self, index):
        original(self, index)
        if index + 1 == blocks:
            raise _StopError

    monkeypatch.setattr(pipeline.Walk, "leave", leave)


def test_killed_and_started_again(source, tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(source), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert child.stdout.readline().strip() == "ready"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists()
    (partial,) = tmp_path.glob(".out.partial-resume-*")
    result = _run(source, out)
    assert result.resumed == 2
    assert not partial.exists()
    assert _files(out) == _files(_run(source, tmp_path / "whole").out)


@pytest.mark.parametrize("settings", [{}, {"desc_act": True}, {"zero_points": "integer"}])
def test_activations_are_the_same_after_a_restart(source, tmp_path, monkeypatch, settings):
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1)
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out", **settings)
    solved = []
    original = pipeline.Walk.solve
    monkeypatch.setattr(
        pipeline.Walk,
        "solve",
        lambda self, i, layers: solved.append(i) or original(self, i, layers),
    )
    result = _run(source, tmp_path / "out", **settings)
    assert (result.resumed, solved) == (1, [1])
    assert _files(result.out) == _files(_run(source, tmp_path / "whole", **settings).out)


@pytest.mark.parametrize(
    "change",
    [{"bits": 4}, {"calibration": token_ids(3)}, {"damp": 0.02}],
    ids=["settings", "data", "solver"],
)
def test_other_settings_start_over(source, tmp_path, monkeypatch, change, caplog):
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1)
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        result = _run(source, tmp_path / "out", **change)
    assert result.resumed == 0
    assert "other settings, data or source; starting over" in caplog.text
    assert _files(result.out) == _files(_run(source, tmp_path / "whole", **change).out)


def test_a_changed_source_starts_over(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 1)
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out")
    weights = source / "model.safetensors"
    os.utime(weights, (time.time(), time.time() + 5))
    assert _run(source, tmp_path / "out").resumed == 0


def test_data_free_runs_resume_too(source, tmp_path, monkeypatch):
    original = pipeline.rtn
    seen = []

    def dying(weight, **kwargs):
        if kwargs["name"].startswith("model.layers.1.mlp") and len(seen) == 0:
            seen.append(kwargs["name"])
            raise _StopError
        return original(weight, **kwargs)

    monkeypatch.setattr(pipeline, "rtn", dying)
    with pytest.raises(_StopError):
        _run(source, tmp_path / "out", method="rtn", calibration=None)
    result = _run(source, tmp_path / "out", method="rtn", calibration=None)
    assert result.resumed == 1
    assert _files(result.out) == _files(
        _run(source, tmp_path / "whole", method="rtn", calibration=None).out
    )
