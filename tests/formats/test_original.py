"""A merged model goes back into the file that its base came in; stock GPTQ is the first such."""

import filecmp
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import RANK, qalora_tensors, write_adapter
from support.directories import unbound
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.formats.export import check_format
from qalora_plugin.formats.write_back import changed_layer, check_layer
from qalora_plugin.tuner.targets import resolve_targets

from .weights import STOCK


@pytest.fixture
def base(tmp_path):
    """A stock GPTQ directory of our own to change."""
    return shutil.copytree(STOCK, tmp_path / "stock")


def _merged(base, folder, adapt="scales", factor=1.0):
    layers = open_quantized(base).layers
    config = {
        "peft_type": "QALORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": sorted(layers),
        "adapt": adapt,
    }
    tensors = {key: factor * value for key, value in qalora_tensors(layers, adapt).items()}
    adapter = write_adapter(folder / "adapter", config, tensors)
    return merge_adapter(adapter, folder / "merged").out


def test_a_zero_adapter_gives_the_same_bytes(base, tmp_path):
    merged = _merged(base, tmp_path, factor=0.0)
    result = export_model(merged, tmp_path / "out", "original")
    assert result.format == "gptq" and "written back" in result.exactness
    names = [path.name for path in base.iterdir()]
    assert filecmp.cmpfiles(base, result.out, names, shallow=False) == (names, [], [])


def test_a_trained_template_and_end_token_are_named(base, tmp_path):
    config = {"bos_token_id": 0, "eos_token_id": 1}
    (base / "generation_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    _merged(base, tmp_path)
    assert "Mind" not in export_model(tmp_path / "merged", tmp_path / "1", "original").exactness
    shutil.rmtree(tmp_path / "merged")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("<|turn|>{{ messages }}")
    config["eos_token_id"] = [2, 1]
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps(config))
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged").out
    result = export_model(merged, tmp_path / "2", "original")
    assert "Mind: chat template and end tokens of the source are kept" in result.exactness
    assert (result.out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_scales_alone_change(base, tmp_path):
    merged = _merged(base, tmp_path)
    out = export_model(merged, tmp_path / "out", "original").out
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"{name}.scales" for name in open_quantized(base).layers}
    written, wanted = open_quantized(out), open_quantized(merged)
    for name in wanted.layers:
        found, expected = written.layer(name), wanted.layer(name)
        assert found.scales.equal(expected.scales) and found.offsets.equal(expected.offsets)


def test_zero_points_do_not_go_back(base, tmp_path):
    merged = _merged(base, tmp_path, adapt="zeros")
    with pytest.raises(CheckpointError, match=r"zero-points have changed.*adapt='scales'"):
        export_model(merged, tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()


def test_a_source_that_changed_is_refused(base, tmp_path):
    merged = _merged(base, tmp_path)
    weights = base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has changed since the base was read"):
        export_model(merged, tmp_path / "out", "original")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"is not there. Name a copy of it with --original"):
        export_model(merged, tmp_path / "out", "original")
    assert export_model(merged, tmp_path / "out", "original", original=STOCK).layers


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "extra/notes.txt"])
def test_any_file_of_the_source_that_changed_is_refused(name, base, tmp_path):
    (base / "extra").mkdir()
    (base / "extra" / "notes.txt").write_text("one")
    merged = _merged(base, tmp_path)
    before = (base / name).read_text()
    (base / name).write_text(before + "\n")
    with pytest.raises(CheckpointError, match=f"{name}: has changed since"):
        export_model(merged, tmp_path / "out", "original")
    (base / name).unlink()
    with pytest.raises(CheckpointError):
        export_model(merged, tmp_path / "out", "original")
    (base / name).write_text(before)
    (base / "added.txt").write_text("later")
    assert (export_model(merged, tmp_path / "out", "original").out / name).read_text() == before


def test_a_record_of_an_earlier_release_knows_the_weights_alone(base, tmp_path):
    merged = unbound(_merged(base, tmp_path))
    config = json.loads((merged / "config.json").read_text())
    source = config["quantization_config"]["base"]["source"]
    source["files"] = {n: f for n, f in source["files"].items() if n.endswith(".safetensors")}
    (merged / "config.json").write_text(json.dumps(config))
    assert export_model(merged, tmp_path / "out", "original").format == "gptq"


@pytest.mark.parametrize(
    ("files", "key"), [({"a": 1}, "source.files.a"), ([], "source.files"), (3, "source.files")]
)
def test_a_record_of_other_types_is_refused(files, key, base, tmp_path):
    merged = unbound(_merged(base, tmp_path))
    config = json.loads((merged / "config.json").read_text())
    config["quantization_config"]["base"]["source"]["files"] = files
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"base.{key}: expected"):
        export_model(merged, tmp_path / "out", "original")


@pytest.mark.parametrize("key", ["format", "path", "frozen"])
def test_a_record_without_a_key_is_refused(key, base, tmp_path):
    merged = unbound(_merged(base, tmp_path))
    config = json.loads((merged / "config.json").read_text())
    del config["quantization_config"]["base"]["source"][key]
    (merged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"base.source.{key}: missing"):
        check_format(merged, "original", "scales")
    with pytest.raises(CheckpointError, match=f"base.source.{key}: missing"):
        export_model(merged, tmp_path / "out", "original")


def test_integers_of_another_shape_are_refused(base, tmp_path):
    """Though those of the source are the first of them."""
    source, merged = open_quantized(base), open_quantized(_merged(base, tmp_path))
    name = min(source.layers)
    before, after = changed_layer(source, merged, name)
    more = torch.empty(len(after.qweight) + 1, after.spec.out_features, device="meta")
    with pytest.raises(CheckpointError, match=f"{name} has other integers"):
        check_layer(source, merged, name, before, replace(after, qweight=more))


def test_a_model_without_a_source_is_refused(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no base.source"):
        export_model(quantized(4).directory, tmp_path / "out", "original")


def test_another_models_file_is_refused(base, tmp_path):
    merged = _merged(base, tmp_path)
    config = json.loads((merged / "config.json").read_text())
    record = config["quantization_config"]["base"]["source"]
    assert record["format"] == "gptq" and record["path"] == str(base)
    assert record["frozen"].keys() == {"zeros", "both"}
    record["frozen"] = {}
    other = open_quantized(STOCK.with_name("gptq_4bit_g32_sym"))
    with pytest.raises(CheckpointError, match=r"has changed since"):
        export_model(merged, tmp_path / "out", "original", original=other.directory)


def test_training_is_kept_within_what_goes_back(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    resolve_targets(QALoRAConfig(), model)  # stock GPTQ is not, unless it is asked for
    resolve_targets(QALoRAConfig(write_back=True, adapt="scales"), model)
    wanted = "in format 'gptq', which cannot take that back .its zero-points are integers.*"
    with pytest.raises(ConfigError, match=wanted + "Set adapt='scales'.*write_back=False.* mlx,"):
        resolve_targets(QALoRAConfig(write_back=True), model)
    record = model.config.quantization_config.base["source"]
    held = next(name for name in open_quantized(base).layers)
    record["frozen"]["scales"] = [held]  # one layer alone cannot go back
    config = QALoRAConfig(write_back=True, adapt="scales")
    resolve_targets(config, model)
    assert config.target_modules == set(open_quantized(base).layers) - {held}
    del model.config.quantization_config.base["source"]
    with pytest.raises(ConfigError, match=r"no record of a source"):
        resolve_targets(QALoRAConfig(write_back=True), model)


def test_import_rounds_nothing_and_remembers_its_source(base, tmp_path, capsys):
    assert cli(["import", str(base), "--out", str(tmp_path / "ours")]) == 0
    assert "written back with --format original: adapt scales\n" in capsys.readouterr().out
    ours, stock = open_quantized(tmp_path / "ours"), open_quantized(base)
    assert ours.bound  # without its manifest too, the tensors know their config.json
    for name in stock.layers:
        for found, expected in zip(
            ours.layer(name).tensors, stock.layer(name).tensors, strict=True
        ):
            assert found is expected is None or found.equal(expected)
    merged = _merged(ours.directory, tmp_path, factor=0.0)
    out = export_model(merged, tmp_path / "out", "original").out
    assert (out / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"in our own format already"):
        import_model(ours.directory, tmp_path / "again")
