"""The command line of `qalora quantize`."""

import json

import pytest

from qalora_plugin.cli import main
from qalora_plugin.quickstart.data import base_model_path

from .models import save


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", "--help"])
    text = capsys.readouterr().out
    for option in ("--bits", "--group-size", "--method", "--calibration", "--zero-points"):
        assert option in text
    for option in ("--format", "--desc-act", "--seed", "--override", "--keep", "--json"):
        assert option in text


def test_quantizes_and_reports(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(100)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "out"
    arguments = ["--bits", "3", "--group-size", "128", "--samples", "2", "--seq-len", "32"]
    arguments += ["--calibration", str(text), "--override", "*.down_proj=bits:8,group_size:64"]
    arguments += ["--keep", "k_proj", "--json"]
    assert main(["quantize", str(base_model_path()), "--out", str(out), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(out) and (out / "config.json").exists()
    assert result["layers"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert result["layers"]["model.layers.0.mlp.up_proj"]["bits"] == 3
    assert "model.layers.2.self_attn.k_proj" in result["kept"]


def test_prints_a_summary(tmp_path, capsys):
    source = save("llama", tmp_path / "source")
    arguments = ["--out", str(tmp_path / "out"), "--method", "rtn", "--group-size", "-1"]
    assert main(["quantize", str(source), *arguments]) == 0
    assert "14 layers in 4 bits" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "5"], "bits must be one of"),
        ([], "GPTQ needs text"),
        (["--method", "rtn", "--group-size", "99"], "group_size 99 is larger"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    source = save("llama", tmp_path / "source")
    capsys.readouterr()
    assert main(["quantize", str(source), "--out", str(tmp_path / "out"), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("qalora: error: ") and message in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["bits:8", "x=bits", "x=bits:eight"])
def test_a_malformed_override_is_wrong_usage(value, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "m", "--out", str(tmp_path / "o"), "--override", value])
    assert "bits:B" in capsys.readouterr().err
