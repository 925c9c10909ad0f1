"""`qalora export`."""

import json
import sys

import pytest

from qalora_plugin.cli import main
from qalora_plugin.formats.export import export_model


def test_export(
    quantized,
    tmp_path,
    capsys,
):
    source = str(quantized(4).directory)
    command = ["export", source, "--format", "mlx", "--out", str(tmp_path / "mlx")]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["layers"], len(result["dense"])) == ("mlx", 12, 2)
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err


def test_inspect_says_what_an_export_is(
    quantized,
    tmp_path,
    capsys,
):
    out = export_model(quantized(4).directory, tmp_path / "out", "torchao").out
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["format"], found["bits"]) == ("export", "torchao", 4)
    assert found["hashes_checked"] and "--against" in found["weights"]
    # to every other command it is no model
    command = ["export", str(out), "--format", "mlx", "--out", str(tmp_path / "again")]
    assert main(command) == 1
    assert "is an export in format 'torchao'" in capsys.readouterr().err
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert main(["inspect", str(out)]) == 1
    assert "FAILED" in (printed := capsys.readouterr().out) and "XXH3-128" in printed
    assert main(["inspect", str(out), "--quick"]) == 0


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--adapter", "a", "--python", "x", "--no-run"], "--no-run, --python"),
        (["--against", "m", "--logits", "--reference", "f"], "--logits, --reference"),
        (["--against", "m", "--no-run", "--python", "x"], "--python"),
    ],
)
def test_verify_refuses_options_of_the_other_comparison(options, refused, capsys):
    assert main(["verify", "m", *options]) == 1
    assert f"error: {refused}" in capsys.readouterr().err


def test_verify_takes_a_base_of_lora_alone(
    quantized,
    tmp_path,
    capsys,
):
    source = quantized(4).directory
    export_model(source, tmp_path / "out", "torchao")
    command = ["verify", str(tmp_path / "out"), "--against", str(source), "--base", str(source)]
    assert main(command) == 1
    assert "leave out base" in capsys.readouterr().err


def test_missing_library_names_the_extra(
    quantized,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    source = str(quantized(4).directory)
    assert main(["export", source, "--format", "gguf", "--out", str(tmp_path / "m.gguf")]) == 1
    assert "pip install '.[export]', in a clone" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
