"""The command line of `qalora quantize`."""

import dataclasses
import json

import pytest

from qalora_plugin import QuantizeOptions
from qalora_plugin.cli import build_parser, main

RTN = ["--method", "rtn"]
TWICE = ["--override", "q_proj=bits:8", "--override", "q_proj=group_size:64"]
GPTQ = ["--calibration", __file__]


def test_quantizes_and_reports(text_model_dir, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(100)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    out = tmp_path / "out"
    arguments = ["--bits", "3", "--group-size", "128", "--samples", "2", "--seq-len", "32"]
    arguments += ["--calibration", str(text), "--override", "*.down_proj=bits:8,group_size:64"]
    arguments += ["--keep", "k_proj", "--no-mse", "--damp", "0.5", "--dtype", "float32", "--json"]
    assert main(["quantize", str(text_model_dir), "--out", str(out), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["out"] == str(out)
    assert result["layers"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert result["layers"]["model.layers.0.mlp.up_proj"]["bits"] == 3
    assert "model.layers.1.self_attn.k_proj" in result["kept"]
    base = json.loads((out / "config.json").read_text())["quantization_config"]["base"]
    assert (base["samples"], base["seq_len"], base["damp"], base["mse"]) == (2, 32, 0.5, False)


def test_prints_a_summary(llama_dir, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--method", "rtn", "--group-size", "-1"]
    assert main(["quantize", str(llama_dir), *arguments]) == 0
    assert "14 layers in 4 bits" in capsys.readouterr().out


def test_defaults_are_those_of_the_options():
    given = vars(build_parser().parse_args(["quantize", "m", "--out", "o"]))
    for field in dataclasses.fields(QuantizeOptions):
        if field.name in given:
            assert given[field.name] == field.default, field.name
    assert given["refine_steps"] and given["damp"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "GPTQ needs text: give --calibration a .txt or .jsonl file"),
        ([], "Or use --method rtn, which is less exact"),
        ([*RTN, *GPTQ], "--calibration does not go with --method rtn"),
        ([*RTN, "--desc-act"], "--desc-act does not go with --method rtn"),
        ([*GPTQ, "--refine-norms"], "--refine-norms is a setting of --refine: give both, or leave"),
        ([*RTN, "--ordering", "none"], "--ordering does not go with --method rtn"),
        ([*GPTQ, "--desc-act", "--ordering", "none"], "leave out one of it and --ordering"),
        ([*RTN, "--offsets-at", "minimum", "--format", "gptq"], "with --format gptq the minimum"),
        ([*RTN, "--group-size", "99"], "group_size 99 is larger"),
        ([*GPTQ, "--seq-len", "4096"], "seq_len 4096 is more than the 2048"),
        ([*RTN, "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        ([*RTN, *TWICE], "--override: 'q_proj' is given more than once"),
        ([*RTN, "--format", "gptq", "--group-size", "20"], "[-1, 16, 32, 64, 128, 256, 512, 1024]"),
    ],
)
def test_bad_input_is_one_line(arguments, message, llama_dir, tmp_path, capsys):
    assert main(["quantize", str(llama_dir), "--out", str(tmp_path / "out"), *arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("qalora: error: ") and message in lines[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "5"], "argument --bits: expected 2, 3, 4 or 8, found '5'"),
        (["--group-size", "0"], "argument --group-size: expected an integer of 1 or more, or -1"),
        (["--samples", "0"], "argument --samples: expected an integer of 1 or more, found '0'"),
        (["--seq-len", "x"], "argument --seq-len: expected an integer of 2 or more, found 'x'"),
        (["--damp", "-1"], "argument --damp: expected a number between 0 and 1, found '-1'"),
        (["--sym", "--zero-points", "integer"], "--zero-points: not allowed with argument --sym"),
        (["--override", "bits:8"], "bits:B"),
        (["--override", "x=bits"], "bits:B"),
        (["--override", "x=width:8"], "bits:B"),
        (["--override", "x=bits:8,bits:4"], "bits:B"),
        (["--override", "x=bits:eight"], "--override: expected 2, 3, 4 or 8, found 'eight'"),
        (["--override", "x=bits:8,group_size:0"], "--override: expected an integer of 1 or more"),
    ],
)
def test_a_value_out_of_range_names_its_option(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "m", "--out", "o", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "bits, group_size, noted",
    [("4", "32", False), ("3", "-1", False), ("8", "32", True), ("4", "16", True)],
)
def test_minima_that_gguf_cannot_hold_are_noted(bits, group_size, noted, llama_dir, capsys):
    grid = ["--bits", bits, "--group-size", group_size, "--offsets-at", "minimum"]
    # the device is refused after the note, before anything is read
    arguments = ["--out", "unused", *RTN, *grid, "--device", "cuda:99"]
    assert main(["quantize", str(llama_dir), *arguments]) == 1
    notes = [line for line in capsys.readouterr().err.splitlines() if "note: --offsets-at" in line]
    assert len(notes) == noted and all("other layers become F16" in line for line in notes)
