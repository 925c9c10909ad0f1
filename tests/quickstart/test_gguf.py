"""`qalora quickstart --model FILE.gguf`: the file is the base, and comes back trained."""

import json

import pytest
from support.gguf_files import write_gguf

from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A GGUF file, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "model.gguf")


def test_the_file_is_trained_and_written_back(file, tmp_path, capsys):
    rows = [{"prompt": f"{n} and the", "completion": f" 123 the {n}"} for n in range(80)]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["quickstart", "--model", str(file), "--dataset", str(data), "--out", str(out)]
    assert main([*command, "--steps", "3", "--batch-size", "4", "--rank", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    base, trained, merged, written = found["rows"]
    assert [row["name"] for row in found["rows"][2:]] == ["merged", "merged, GGUF"]
    assert merged["loss"] == trained["loss"] != base["loss"] and written["loss"] is None
    assert base["size"] == written["size"] == file.stat().st_size
    assert 1e8 < found["memory"]["peak of the process"] < 4e9
    assert found["merged_equals_unmerged"] and found["verified_layers"] == 14
    assert "14 layers are equal (bit for bit)" in found["runtime"]
    assert {row["prompt"] for row in found["samples"]} < {f"{n} and the\n" for n in range(80)}
    assert found["paths"]["gguf"] == str(out / "merged-original.gguf")
    assert len(open_quantized(out / "merged-original.gguf").layers) == 14
