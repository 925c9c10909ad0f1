"""An interrupted run goes on where it stopped and ends in the same bytes."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.architectures import save, token_ids

from qalora_plugin.quantize import walk
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


def _die_after_a_block(source, out, monkeypatch, **settings):
    """Let a run die when it has written its first block."""
    leave = walk.Walk.leave

    def dying(self, index):
        leave(self, index)
        raise _StopError

    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "leave", dying)
        with pytest.raises(_StopError):
            _run(source, out, **settings)


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


@pytest.mark.parametrize("settings", [{"desc_act": True}, {"zero_points": "integer"}])
def test_activations_are_the_same_after_a_restart(source, tmp_path, monkeypatch, settings):
    _die_after_a_block(source, tmp_path / "out", monkeypatch, **settings)
    solved = []
    original = walk.Walk.solve
    monkeypatch.setattr(
        walk.Walk, "solve", lambda self, i, layers: solved.append(i) or original(self, i, layers)
    )
    result = _run(source, tmp_path / "out", **settings)
    assert (result.resumed, solved) == (1, [1])
    assert _files(result.out) == _files(_run(source, tmp_path / "whole", **settings).out)


def test_other_settings_data_or_source_start_over(source, tmp_path, monkeypatch, caplog):
    out = tmp_path / "out"
    _die_after_a_block(source, out, monkeypatch)
    for change in ({"bits": 4}, {"calibration": token_ids(3)}, {"damp": 0.02}):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert _run(source, out, **change).resumed == 0, change
        assert "other settings, data or source; starting over" in caplog.text
        shutil.rmtree(out)
    os.utime(source / "model.safetensors", (time.time(), time.time() + 5))
    assert _run(source, out).resumed == 0


def test_data_free_runs_resume_too(source, tmp_path, monkeypatch):
    free = {"method": "rtn", "calibration": None, "seq_len": None}
    original = walk.rtn

    def dying(weight, spec, **kwargs):
        if kwargs["name"].startswith("model.layers.1.mlp"):
            raise _StopError
        return original(weight, spec, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "rtn", dying)
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out", **free)
    assert _run(source, tmp_path / "out", **free, offsets_at="minimum").resumed == 0
    shutil.rmtree(tmp_path / "out")
    result = _run(source, tmp_path / "out", **free)
    assert result.resumed == 1
    assert _files(result.out) == _files(_run(source, tmp_path / "whole", **free).out)
