"""MLX's own files as bases: read exactly, trained, and written back with nothing else changed."""

import filecmp
import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.adapters import FIXTURES, RANK, edit_json, qalora_tensors, write_adapter
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.formats.directory import dense_weight
from qalora_plugin.verify.merge import verify_merge

NAMES = sorted(path.name for path in FIXTURES.glob("mlx_*"))
MIXED = FIXTURES / "mlx_4bit_g32_bf16_mixed"
FILE = "model.safetensors"


@pytest.fixture(params=NAMES)
def base(request):
    """Every committed directory that mlx-lm wrote; integration/peers/make_mlx_fixture.py."""
    return FIXTURES / request.param


def _adapter(base, folder, adapt="zeros", factor=1.0):
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
    return write_adapter(folder / "adapter", config, tensors)


def _merged(base, folder, **adapter):
    return merge_adapter(_adapter(base, folder, **adapter), folder / "merged").out


def test_weights_are_mlxs_own(base):
    source, expected = open_quantized(base), load_file(base / "reference.safetensors")
    modules = [name for name in expected if name.endswith(".weight")]
    assert {f"{name}.weight" for name in source.layers} < set(modules)
    for name in modules:
        layer = name.removesuffix(".weight")
        if layer in source.layers:
            weight = source.layer(layer)
            share = (weight.scales < 0).float().mean()
            assert 0.3 < share < 0.7
            found = dense_weight(weight)
        else:  # an embedding, or the head
            found = source.reader.get(name)
            assert b"".join(source.reader.chunks(name)) == found.numpy().tobytes()
        assert torch.equal(found[::8], expected[name]), name


def test_the_model_computes_what_mlx_computes(base):
    reference = load_file(base / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = model(reference["input_ids"]).logits
    torch.testing.assert_close(logits, reference["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("adapt", ["zeros", "both"])
def test_a_zero_adapter_gives_the_same_bytes(adapt, base, tmp_path):
    out = export_model(
        _merged(base, tmp_path, adapt=adapt, factor=0.0), tmp_path / "out", "original"
    ).out
    names = [path.name for path in base.iterdir()]
    assert filecmp.cmpfiles(base, out, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("adapt", ["zeros", "scales"])
def test_the_merged_model_is_what_is_written_back(adapt, base, tmp_path):
    merged = _merged(base, tmp_path, adapt=adapt)
    report = verify_merge(merged, tmp_path / "adapter", base)
    assert report.output_error <= 1 < report.output_change
    out = export_model(merged, tmp_path / "out", "original").out
    before, after = load_file(base / FILE), load_file(out / FILE)
    changed = {name for name in before if not before[name].equal(after[name])}
    layers = open_quantized(base).layers
    parts = ("biases",) if adapt == "zeros" else ("biases", "scales")
    assert changed == {f"{layer}.{part}" for layer in layers for part in parts}
    assert {name for name in before if before[name].dtype != after[name].dtype} == set()
    written, wanted = open_quantized(out), open_quantized(merged)
    for name in layers:
        for found, expected in zip(
            written.layer(name).tensors, wanted.layer(name).tensors, strict=True
        ):
            assert found is expected is None or found.equal(expected)


def test_trained_and_merged_in_memory(tmp_path):
    """What training computes is what the merged model computes, bit for bit, in bf16's numbers."""
    model = AutoModelForCausalLM.from_pretrained(MIXED, dtype=torch.float32)
    settings = QALoRAConfig(r=4, adapt="both", init_lora_weights=False, task_type="CAUSAL_LM")
    trained = get_peft_model(model, settings).eval()
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = trained(ids).logits
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged").out
    again = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    config = again.config.quantization_config
    assert (config.scales_dtype, config.offsets_at) == ("bfloat16", "minimum")
    out = export_model(merged, tmp_path / "out", "original").out
    back = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
        assert torch.equal(back(ids).logits, expected)


def test_doors(tmp_path, capsys):
    assert cli(["inspect", str(MIXED), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["valid"], found["layers"]) == ("mlx model", True, 6)
    assert found["bits"] == {"4": 5, "8": 1} and found["group_size"] == {"32": 5, "64": 1}
    assert 4 < found["bits_per_weight"] < 7
    assert cli(["import", str(MIXED), "--out", str(tmp_path / "ours")]) == 0
    assert "adapt zeros, scales, both" in capsys.readouterr().out
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization" not in config
    ours, theirs = open_quantized(tmp_path / "ours"), open_quantized(MIXED)
    for name in theirs.layers:
        assert ours.layer(name).offsets.equal(theirs.layer(name).offsets)
    out = export_model(_merged(ours.directory, tmp_path, factor=0.0), tmp_path / "out", "original")
    assert (out.out / FILE).read_bytes() == (MIXED / FILE).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(
        MIXED, quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    )
    loaded.save_pretrained(tmp_path / "saved")
    saved = open_quantized(tmp_path / "saved")
    assert not saved.is_foreign and saved.layers == theirs.layers


def test_files_of_old_releases_name_no_quantization_config(tmp_path):
    directory = shutil.copytree(MIXED, tmp_path / "old")
    edit_json(directory / "config.json", quantization_config=None)
    model = AutoModelForCausalLM.from_pretrained(directory)
    name = next(iter(open_quantized(directory).layers))
    assert model.get_submodule(name).spec.bits == 4


def _quantization(**changes):
    def change(directory):
        config = json.loads((directory / "config.json").read_text())
        edit_json(directory / "config.json", quantization=config["quantization"] | changes)

    return change


def _tensors(change):
    def apply(directory):
        tensors = load_file(directory / FILE)
        change(tensors)
        save_file(tensors, directory / FILE, metadata={"format": "mlx"})

    return apply


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "mxfp4": (_quantization(mode="mxfp4"), r"MLX's mode 'mxfp4'.*mlx_lm.convert -q"),
    "a width": (_quantization(bits=7), r"expected bits .* found 7"),
    "a group size": (_quantization(group_size=16), r"group_size of 32, 64 or 128, found 4 and 16"),
    "another grid": (_quantization(bits=8), r"are not those of bits=8, group_size=32"),
    "fp32": (
        _tensors(
            lambda t: t.update({f"{Q}.{p}": t[f"{Q}.{p}"].float() for p in ("scales", "biases")})
        ),
        r"scales and biases are float32; expected both in float16 or bfloat16",
    ),
    "two dtypes": (
        _tensors(
            lambda t: t.update({f"{Q}.{p}": t[f"{Q}.{p}"].half() for p in ("scales", "biases")})
        ),
        r"scales in bfloat16 and in float16; expected one dtype",
    ),
    "no biases": (_tensors(lambda t: t.pop(f"{Q}.biases")), r"q_proj\.biases is missing"),
    "experts": (
        _tensors(lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][None]})),
        r"a mixture's experts",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case, tmp_path):
    change, message = REFUSED[case]
    directory = shutil.copytree(MIXED, tmp_path / "changed")
    change(directory)
    with pytest.raises(CheckpointError, match=message):
        open_quantized(directory)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)
    assert cli(["import", str(directory), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_gets_no_name_of_a_file(tmp_path):
    merged = _merged(MIXED, tmp_path)
    for format in ("mlx", "original"):
        with pytest.raises(ConfigError, match=r"name of a directory.*ends in \.gguf"):
            export_model(merged, tmp_path / "out.gguf", format)
    assert not (tmp_path / "out.gguf").exists()
