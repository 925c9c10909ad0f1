"""`qalora inspect` and what it is made of."""

import json

import pytest

from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError
from qalora_plugin.files.manifest import write_manifest

from .conftest import FIXTURES


def test_a_quantized_base(base_dir, capsys):
    assert main(["inspect", str(base_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "quantized base" and found["valid"] and found["layers"] == 14
    assert (found["bits"], found["group_size"], found["desc_act"]) == (4, 32, False)
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172)
    assert found["weights_quantized"] == weights
    sizes = found["bytes"]
    assert sum(sizes.values()) == 2 * sizes["total"]
    # 172 inputs are padded to 192 in the packed integers, and make six groups
    groups = 2 * (2 * 64 * 2 + 2 * 32 * 2 + 2 * 172 * 2 + 6 * 64)
    assert sizes["scales"] == sizes["offsets"] == 2 * groups
    assert sizes["integers"] == (weights + 2 * 64 * 20) // 2
    bits = 8 * (sizes["integers"] + sizes["scales"] + sizes["offsets"]) / weights
    assert found["bits_per_weight"] == round(bits, 3)


def test_table(base_dir, capsys):
    assert main(["inspect", str(base_dir), "--quick"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {key.strip(): value.strip() for key, value in lines.items()}
    assert found["kind"] == "quantized base" and found["bits"] == "4"
    assert found["check"] == "passed" and found["size, total"].endswith("KB")


def test_the_other_kinds(dense_dir, base_dir, altered):
    assert describe(dense_dir)["kind"] == "16-bit model"
    stock = describe(FIXTURES / "gptq_4bit_g128_actorder_asym")
    assert stock["kind"] == "gptq model" and stock["desc_act"]
    assert stock["checkpoint_format"] == "gptq" and stock["sym"] is False
    adapter = describe(FIXTURES / "use_qalora_adapter")
    assert adapter["kind"] == "adapter" and adapter["r"] == 4
    merged = altered(base_dir, merged={"adapter": "x"})
    assert describe(merged)["kind"] == "merged model"


def test_problems_are_found(base_dir, altered, capsys):
    directory = altered(base_dir, bits=3)
    assert main(["inspect", str(directory)]) == 1
    assert "FAILED" in (out := capsys.readouterr().out) and "fit bits=4" in out


def test_a_flipped_bit_is_found_by_its_hash(base_dir, altered):
    directory = altered(base_dir)
    path = directory / "model.safetensors"
    write_manifest(directory, [path.name])
    assert describe(directory)["hashes_checked"] is True
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    assert describe(directory, quick=True)["valid"]
    found = describe(directory)
    assert not found["valid"] and "XXH3-128" in found["problem"]


def test_what_is_neither(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="never read"):
        describe(tmp_path)
