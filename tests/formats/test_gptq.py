"""Stock GPTQ from a merged model: exact with adapt="scales", refused with changed offsets."""

import json
import shutil

import pytest
import torch
from support.adapters import edit_tensors
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM, LlamaConfig

from qalora_kernels import packing
from qalora_plugin import merge_adapter, quantize_model, verify_merge
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, ConfigError, QuantizationError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.gptq import FORMAT
from qalora_plugin.formats.zero_points import integer_zeros
from qalora_plugin.quickstart.embedded import base_model_path

from .weights import BLOCKS_OF_32, STOCK, error_in_steps, exact_weight


def signed(fixture, folder):
    """The fixture in our format, half of its outputs negated: with negative scales."""

    def negate(tensors):
        for name in tensors:
            if name.endswith((".scales", ".offsets")):
                tensors[name][:, 1::2] *= -1

    out = import_model(fixture, folder / "signed").out
    edit_tensors(out / "model.safetensors", negate)
    return out


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(
    "name", ["2bit_g32_asym", "3bit_g32_asym", "4bit_g32_asym", "8bit_g32_sym"]
)
def test_negative_scales_are_held_exactly(name, format, tmp_path):
    base = open_quantized(signed(STOCK.with_name(f"gptq_{name}"), tmp_path))
    adapter = random_adapter(base, tmp_path / "adapter", "scales")
    merged = merge_adapter(adapter, tmp_path / "merged", base.directory).out
    assert verify_merge(merged, adapter, base.directory).output_error <= 1
    exported = open_quantized(export_model(merged, tmp_path / "out", format).out)
    assert exported.format == format
    for layer in base.layers:
        found, wanted = exported.layer(layer), open_quantized(merged).layer(layer)
        assert (found.scales < 0).any() and (found.scales > 0).any()
        assert torch.equal(found.codes() - found.spec.mid, wanted.codes() - wanted.spec.mid)
        assert torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.offsets, wanted.offsets)


def test_one_group_of_all_inputs_is_no_override(tmp_path):
    """GPTQModel loads group_size -1, and no number of inputs but those that it has kernels for."""
    base = tmp_path / "base"
    shutil.copytree(STOCK.with_name("gptq_4bit_g-1_asym"), base)

    def widen(tensors):
        for name in [n.removesuffix(".qweight") for n in tensors if n.endswith("v_proj.qweight")]:
            (rows, n), part = tensors[f"{name}.qweight"].shape, f"{name}.qzeros"
            codes = packing.unpack(tensors[f"{name}.qweight"], 4, 8 * rows)
            tensors[f"{name}.qweight"] = packing.pack(codes, 8)
            zeros = packing.unpack_columns(tensors[part], 4, n)
            tensors[part] = packing.pack_columns(zeros.int(), 8)

    edit_tensors(base / "model.safetensors", widen)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"+:.*v_proj": {"bits": 8}}
    (base / "config.json").write_text(json.dumps(config))
    out = export_model(base, tmp_path / "out", "gptq", checkpoint_format="gptq_v2").out
    found = json.loads((out / "quantize_config.json").read_text())
    (name,) = found["dynamic"]
    assert "v_proj" in name and found["dynamic"][name] == {"bits": 8, "group_size": -1}
    assert open_quantized(out).layers == open_quantized(base).layers


def test_merged_scales_keep_integers_and_zero_points(tmp_path):
    base = open_quantized(STOCK)
    adapter = random_adapter(base, tmp_path / "adapter", "scales")
    merge_adapter(adapter, tmp_path / "merged", STOCK)
    result = export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    assert (result.layers, result.dense) == (len(base.layers), {})
    merged, exported = open_quantized(tmp_path / "merged"), open_quantized(result.out)
    assert exported.format == "gptq"
    for name in base.layers:
        before, wanted, found = base.layer(name), merged.layer(name), exported.layer(name)
        assert torch.equal(found.qweight, before.qweight)
        assert torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.offsets, wanted.offsets)
        assert not torch.equal(found.scales, before.scales)
        zeros = [integer_zeros(name, layer, FORMAT) for layer in (before, found)]
        assert torch.equal(*zeros)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_symmetric_base_merges_into_sym_true(method, bits, tmp_path):
    text = {"calibration": torch.arange(512).view(8, 64) % 2000} if method == "gptq" else {}
    base = tmp_path / "base"
    quantize_model(base_model_path(), base, bits=bits, method=method, zero_points="none", **text)
    layers = open_quantized(base)
    assert layers.config.offsets_dtype == "float16"
    assert layers.config.base["zero_points"] == "none"
    adapter = random_adapter(layers, tmp_path / "adapter", "scales")
    merge_adapter(adapter, tmp_path / "merged", base)
    merged = open_quantized(tmp_path / "merged")
    result = export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    config = json.loads((result.out / "config.json").read_text())["quantization_config"]
    assert (config["sym"], config["desc_act"], config["bits"]) == (True, False, bits)
    exported = open_quantized(result.out)
    for name in layers.layers:
        found = exported.layer(name)
        assert torch.equal(found.qweight, layers.layer(name).qweight)
        assert torch.equal(found.scales, merged.layer(name).scales)
        assert not found.offsets.any()


def test_a_quantized_head_is_told_of(tmp_path):
    """GPTQModel 5.8 leaves a head without numbers that quantize_config.json does not tell of, and
    AutoGPTQ every quantized one."""
    base = shutil.copytree(STOCK, tmp_path / "base")

    def quantize_head(state):
        assert state.pop("lm_head.weight").shape == (32, 64)
        for part in ("qweight", "qzeros", "scales", "g_idx"):  # of a layer of the same sizes
            state[f"lm_head.{part}"] = state[f"model.layers.0.self_attn.k_proj.{part}"].clone()

    edit_tensors(base / "model.safetensors", quantize_head)
    with pytest.raises(ConfigError, match=r"lm_head is quantized, .*'gptq_v2'"):
        export_model(base, tmp_path / "v1", "gptq")
    for source, told in ((base, True), (STOCK, False)):
        out = export_model(source, tmp_path / str(told), "gptq", checkpoint_format="gptq_v2").out
        assert json.loads((out / "quantize_config.json").read_text())["lm_head"] is told


def test_changed_offsets_are_refused_by_name(tmp_path):
    adapter = random_adapter(open_quantized(STOCK), tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged", STOCK)
    with pytest.raises(
        CheckpointError, match=r"zero-points are not integers .* away.* --requantize"
    ):
        export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    """A Llama with the quickstart's tokenizer and changed offsets; 8 bits in one projection."""
    folder = tmp_path_factory.mktemp("merged")
    base = family(LlamaConfig(**BLOCKS_OF_32), 4, 32, (8, 32))
    adapter = random_adapter(base, folder / "adapter")
    return QuantizedCheckpoint(merge_adapter(adapter, folder / "merged", base.directory).out)


@pytest.fixture(scope="module")
def token_ids():
    return torch.randint(3, 2048, (20, 32), generator=torch.Generator().manual_seed(0))


def test_requantized_weights_are_close_and_the_loss_is_measured(merged, token_ids, tmp_path):
    result = export_model(
        merged.directory,
        tmp_path / "gptq",
        "gptq",
        checkpoint_format="gptq_v2",
        requantize=True,
        calibration=token_ids,
        samples=4,
    )
    exported = open_quantized(result.out)
    assert exported.format == "gptq"
    assert (result.layers, result.dense, set(exported.layers)) == (7, {}, set(merged.layers))
    integers_changed = False
    for name, spec in merged.layers.items():
        assert (exported.layers[name].bits, spec.bits) == (spec.bits, spec.bits)
        layer = exported.layer(name)
        integer_zeros(name, layer, FORMAT)  # raises where they are not
        integers_changed |= not torch.equal(layer.qweight, merged.layer(name).qweight)
        before, after = exact_weight(merged, name), exact_weight(exported, name)
        assert (after - before).norm() < (0.02 if spec.bits == 8 else 0.15) * before.norm()
        assert error_in_steps(after, merged, name) > 0.01
    assert integers_changed

    # 4 windows were asked for and 20 given: 2 of the first 20 are held out (an eighth)
    held_out = token_ids[18:]
    models = [
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for directory in (merged.directory, result.out)
    ]
    with torch.no_grad():
        p, q = (model(held_out).logits[:, :-1].double().log_softmax(-1) for model in models)
    labels = held_out[:, 1:, None]
    measured = result.measured
    assert measured["tokens"] == 2 * 31
    assert measured["exact"] == pytest.approx(-p.gather(2, labels).mean().item(), abs=1e-4)
    assert measured["requantized"] == pytest.approx(-q.gather(2, labels).mean().item(), abs=1e-4)
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    assert measured["divergence"] == pytest.approx(divergence, rel=1e-2) and divergence > 0
    assert f"{measured['exact']:.4f} -> {measured['requantized']:.4f}" in result.exactness


def test_requantize_command(merged, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text((base_model_path() / "README.md").read_text())
    out = tmp_path / "gptq"
    command = ["export", str(merged.directory), "--format", "gptq", "--out", str(out)]
    again = ["--requantize", "--calibration", str(text), "--samples", "4", "--seq-len", "24"]
    mixed = ["--checkpoint-format", "gptq_v2", "--json"]
    assert main(command) == 1
    assert "differ in bits or group_size" in capsys.readouterr().err
    assert main([*command, *again, *mixed]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured"]["text"] == str(text)
    assert result["measured"]["divergence"] > 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not (out / "dense").exists() and not (out / "new").exists()
    # the weights are others now, and `verify` says so
    assert main(["verify", str(out), "--against", str(merged.directory), "--no-run"]) == 1
    message = capsys.readouterr().err
    assert "weights are not those of the merged model. Quantized again, not exact" in message
    assert main(["verify", str(out), "--against", str(out), "--no-run"]) == 0


def test_requantize_is_refused_where_it_is_not_needed_or_not_possible(merged, token_ids, tmp_path):
    with pytest.raises(ConfigError, match="zero-points are integers"):
        export_model(STOCK, tmp_path / "gptq", "gptq", requantize=True)
    with pytest.raises(ConfigError, match="nothing is calibrated"):
        export_model(STOCK, tmp_path / "gptq", "gptq", calibration=token_ids)
    options = {"requantize": True, "checkpoint_format": "gptq_v2"}
    with pytest.raises(QuantizationError, match="another to measure on"):
        export_model(
            merged.directory, tmp_path / "gptq", "gptq", calibration=token_ids[:1], **options
        )
    assert not any(tmp_path.iterdir())


def test_unknown_format_and_option(tmp_path):
    with pytest.raises(ConfigError, match=r"expected one of gptq, .* found 'hqq'"):
        export_model(STOCK, tmp_path / "out", "hqq")
    with pytest.raises(ConfigError, match="'mlx' has no option 'base'"):
        export_model(STOCK, tmp_path / "out", "mlx", base="x")
