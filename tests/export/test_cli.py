"""`qalora export`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qalora_plugin.checkpoint.base import QuantizedCheckpoint
from qalora_plugin.cli import main


def test_export(
    quantized: Callable[..., QuantizedCheckpoint],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = str(quantized(4).directory)
    command = ["export", source, "--format", "mlx", "--out", str(tmp_path / "mlx")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["layers"], len(result["dense"])) == ("mlx", 12, 2)
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err


def test_missing_library_names_the_extra(
    quantized: Callable[..., QuantizedCheckpoint],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    source = str(quantized(4).directory)
    assert main(["export", source, "--format", "gguf", "--out", str(tmp_path / "m.gguf")]) == 1
    assert "pip install 'qalora-plugin[export]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
