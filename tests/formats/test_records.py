"""The records of formats: recognised on disk, complete, and imported without their code."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qalora_kernels import QuantSpec
from qalora_kernels.stored import QUANT_METHOD
from qalora_plugin.checkpoint.format import exports, foreign_config, format_named, formats
from qalora_plugin.checkpoint.kind import Kind, find_kind
from qalora_plugin.formats import FOLDERS
from qalora_plugin.formats.export import export_model
from qalora_plugin.hub.card import engines_of

from .weights import ACT_ORDER, STOCK

ROOT = Path(__file__).parents[2]


def test_an_export_into_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export_model(STOCK, ".", "torchao").out == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "qalora_export.json"} <= names


def test_importing_the_package_imports_records_alone():
    code = (
        "import sys, qalora_plugin.formats\n"
        "print(*(m for m in sys.modules if m.startswith('qalora_plugin.formats')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ["qalora_plugin.formats", *(f"qalora_plugin.formats.{name}" for name in FOLDERS)]
    assert done.stdout.split() == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_have_what_their_records_promise(name):
    format = format_named(name.replace("_", "-"))
    assert format.package == f"qalora_plugin.formats.{name}" and format in formats()
    own = format.is_export and not format.of_source
    assert format.script.is_file() == own
    parts = {
        "write": format.is_export,
        "weights": own,
        "read": format.is_base,
        "record": format.suffix,
    }
    parts["write_back"] = format.can_write_back
    for part, wanted in parts.items():
        assert bool(importlib.util.find_spec(f"{format.package}.{part}")) == bool(wanted), part
    assert "me/model" in format.usage.format(repo_id="me/model", file="model.gguf")


def test_the_page_says_of_every_engine_what_its_record_says_and_a_test_finds():
    page = (ROOT / "docs" / "export.md").read_text()
    names = [QUANT_METHOD, *(f.name for f in exports() if not f.of_source)]
    rows = []
    for name in names:
        assert engines_of(name), name
        for engine in engines_of(name):
            file, _, test = engine.test.partition("::")
            rows.append(
                f"| `{name}` | {engine.name} | {engine.runs} | {engine.note} | "
                f"[{test}](../{file}) |"
            )
            assert f"def {test}(" in (ROOT / file).read_text(), engine.test
    table = [line for line in page.splitlines() if "](../integration/" in line]
    assert table == rows


def test_recognised_on_disk(tmp_path):
    for directory in (STOCK, ACT_ORDER):
        kind = find_kind(directory)
        assert kind.format is kind.base is format_named("gptq") and not kind.is_16_bit
    assert find_kind(tmp_path) == find_kind(tmp_path / "none.gguf") == Kind()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert find_kind(tmp_path / "model.gguf") == Kind(
        format=format_named("gguf"), base=format_named("gguf")
    )
    (tmp_path / "quantize_config.json").write_text("{}")
    assert find_kind(tmp_path).format is format_named("gptq")
    for config, name in (
        ({"quantization_config": {"quant_method": "qalora"}}, None),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, "mlx"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        kind = find_kind(tmp_path)
        assert (kind.format and kind.format.name) == name
        assert kind.method == config["quantization_config"].get("quant_method")
        assert kind.base is (kind.format if name == "mlx" else None) and not kind.is_16_bit
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "adapter_config.json").write_text("{}")  # what has files of its own goes first
    kind = find_kind(tmp_path)
    assert kind.format is format_named("lora") and kind.is_adapter
    assert kind.base is format_named("gptq")  # the model beside the adapter is read all the same


def test_a_16_bit_model_has_no_sign_of_quantization(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_kind(tmp_path) == Kind(is_16_bit=True)
    (tmp_path / "quantize_config.json").write_text("{}")  # AutoGPTQ's
    assert not find_kind(tmp_path).is_16_bit


@pytest.mark.parametrize(("format", "export"), [("mlx", "mlx"), ("gptq", None), ("lora", None)])
def test_only_what_is_not_read_is_an_export(format, export, tmp_path):
    (tmp_path / "qalora_export.json").write_text(json.dumps({"format": format}))
    assert find_kind(tmp_path).export == export


def test_only_what_is_read_is_a_base():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    found = foreign_config(config, Path("config.json"))
    assert found is not None and (found.bits, found.group_size) == (4, 32)
    for method in ("torchao", "qalora", "hqq"):
        assert foreign_config(config | {"quant_method": method}, Path("config.json")) is None


@pytest.mark.parametrize(
    ("name", "spec", "block"),
    [
        ("torchao", QuantSpec(4, 64, 96, 1), 32),
        ("mlx", QuantSpec(4, -1, 192, 1), 64),
        ("mlx", QuantSpec(4, 32, 172, 1), 0),
        ("gguf", QuantSpec(4, 128, 256, 1), 32),
        ("onnx", QuantSpec(4, 48, 172, 1), 16),
        ("onnx", QuantSpec(4, -1, 172, 1), 16),
        ("onnx", QuantSpec(4, -1, 300, 1), 256),
        ("onnx", QuantSpec(4, 8, 64, 1), 0),
    ],
)
def test_groups_are_cut_into_blocks(name, spec, block):
    grids = format_named(name).grids
    assert grids.block(spec) == block
    assert (grids.obstacle(spec, False) is None) == bool(block)
    assert "act-order" in str(grids.obstacle(spec, True))
