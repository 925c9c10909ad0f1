"""The command line of `qalora quantize`."""

import json

import pytest
from support.architectures import save

from qalora_plugin.cli import main
from qalora_plugin.quickstart.embedded import base_model_path

RTN = ["--method", "rtn"]
GPTQ = ["--calibration", __file__]


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
        ([], "GPTQ needs text: give --calibration FILE"),
        ([], "--method rtn"),
        ([*RTN, "--group-size", "99"], "group_size 99 is larger"),
        ([*RTN, "--calibration", "text.txt"], "--calibration is for --method gptq, found rtn"),
        ([*RTN, "--desc-act"], "--desc-act is for --method gptq, found rtn"),
        ([*RTN, "--ordering", "none"], "--ordering is for --method gptq, found rtn"),
        ([*GPTQ, "--desc-act", "--ordering", "none"], "leave out one of it and --ordering"),
        ([*GPTQ, "--seq-len", "4096"], "seq_len 4096 is more than the 2048"),
        ([*RTN, "--device", "foo"], "device 'foo' cannot be used"),
        ([*RTN, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        ([*RTN, "--format", "gptq", "--group-size", "20"], "[-1, 16, 32, 64, 128, 256, 512, 1024]"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    source = save("llama", tmp_path / "source")
    capsys.readouterr()
    assert main(["quantize", str(source), "--out", str(tmp_path / "out"), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("qalora: error: ") and message in lines[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "5"], "argument --bits: expected 2, 3, 4 or 8, found '5'"),
        (["--group-size", "0"], "argument --group-size: expected an integer of 1 or more, or -1"),
        (["--samples", "0"], "argument --samples: expected an integer of 1 or more, found '0'"),
        (["--seq-len", "x"], "argument --seq-len: expected an integer of 2 or more, found 'x'"),
        (["--damp", "-1"], "argument --damp: expected a number between 0 and 1, found '-1'"),
    ],
)
def test_a_value_out_of_range_names_its_option(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "m", "--out", str(tmp_path / "o"), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, noted",
    [
        (["--bits", "4", "--group-size", "32"], False),
        (["--bits", "3", "--group-size", "-1"], False),
        (["--bits", "8", "--group-size", "32"], True),
        (["--bits", "4", "--group-size", "16"], True),
    ],
)
def test_minima_that_gguf_cannot_hold_are_noted(arguments, noted, tmp_path, capsys):
    source = save("llama", tmp_path / "source")
    arguments = [*RTN, *arguments, "--offsets-at", "minimum"]
    assert main(["quantize", str(source), "--out", str(tmp_path / "out"), *arguments]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: --offsets-at" in line]
    assert len(notes) == noted and all("other layers become F16" in line for line in notes)


@pytest.mark.parametrize(
    "value, message",
    [
        ("bits:8", "bits:B"),
        ("x=bits", "bits:B"),
        ("x=width:8", "bits:B"),
        ("x=bits:eight", "--override: expected 2, 3, 4 or 8, found 'eight'"),
        ("x=bits:8,group_size:0", "--override: expected an integer of 1 or more, or -1"),
    ],
)
def test_a_malformed_override_is_wrong_usage(value, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "m", "--out", str(tmp_path / "o"), "--override", value])
    assert message in capsys.readouterr().err
