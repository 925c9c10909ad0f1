"""Bases that other programs packed (integration/bases/make_fixtures.py): read and given back."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM

from qalora_kernels import reference
from qalora_plugin import QALoRAConfig, QALoRAQuantConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.checkpoint.format import exports
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.tuner.targets import resolve_targets

from .weights import FIXTURES

# name -> format, bits, group size, part of the tensors' names that holds scales
BASES = {
    "ct_3bit_g16_asym": ("compressed-tensors", 3, 16, "weight_scale"),
    "ct_4bit_g32_asym": ("compressed-tensors", 4, 32, "weight_scale"),
    "ct_4bit_g32_sym_bf16": ("compressed-tensors", 4, 32, "weight_scale"),
    "ct_8bit_channel_asym": ("compressed-tensors", 8, -1, "weight_scale"),
    "awq_4bit_g32_asym": ("awq", 4, 32, "scales"),
    "autoround_4bit_g32_asym": ("auto-round", 4, 32, "scales"),
    "autoround_3bit_g32_sym": ("auto-round", 3, 32, "scales"),
    "autoround_8bit_g32_asym": ("auto-round", 8, 32, "scales"),
    "autoround_awq_4bit_g32_asym": ("auto-round", 4, 32, "scales"),
}
every = pytest.mark.parametrize("name", BASES)


@every
def test_weights_are_what_the_owner_dequantizes(name):
    format, bits, group_size, _ = BASES[name]
    checkpoint = open_quantized(FIXTURES / name)
    weights = load_file(FIXTURES / name / "reference.safetensors")
    assert checkpoint.format == format and len(checkpoint.layers) == len(weights) == 7
    assert (checkpoint.config.bits, checkpoint.config.group_size) == (bits, group_size)
    assert checkpoint.config.dynamic == {} and not checkpoint.config.desc_act
    for layer, spec in checkpoint.layers.items():
        weight = checkpoint.layer(layer)
        found = reference.dequantize(weight, torch.float32).t()
        assert torch.equal(found, weights[f"{layer}.weight"]), layer
        zeros = spec.mid - weight.offsets.double() / weight.scales.double()
        assert torch.equal(zeros, zeros.round()) and zeros.min() >= 0 and zeros.max() < 1 << bits
        assert torch.equal(checkpoint.qweight(layer), weight.qweight)


@every
def test_transformers_loads_it_as_a_base(name):
    weights = load_file(FIXTURES / name / "reference.safetensors")
    bits, group_size = BASES[name][1:3]
    model, info = AutoModelForCausalLM.from_pretrained(
        FIXTURES / name,
        dtype=torch.float32,
        quantization_config=QALoRAQuantConfig(bits, group_size),
        output_loading_info=True,
    )
    assert not any(info.values())
    for layer, weight in weights.items():
        module = model.get_submodule(layer.removesuffix(".weight"))
        assert torch.equal(module.packed.dequantize().t(), weight)
    config = QALoRAConfig(adapt="scales")
    resolve_targets(config, model)
    assert len(config.target_modules) == 7
    for adapt in ("zeros", "both"):
        with pytest.raises(ConfigError, match=r"zero-points are integers.*Set adapt='scales'"):
            resolve_targets(QALoRAConfig(adapt=adapt), model)
        resolve_targets(QALoRAConfig(adapt=adapt, write_back=False), model)


@every
def test_merged_scales_alone_change(name, tmp_path):
    base = FIXTURES / name
    adapter = random_adapter(open_quantized(base), tmp_path / "adapter", "scales", size=0.05)
    merged = merge_adapter(adapter, tmp_path / "merged", base).out
    result = export_model(merged, tmp_path / "out", "original")
    assert result.format == BASES[name][0] and result.layers == 7
    before = load_file(base / "model.safetensors")
    after = load_file(result.out / "model.safetensors")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    wanted = open_quantized(merged)
    assert changed == {f"{layer}.{BASES[name][3]}" for layer in wanted.layers}
    found = open_quantized(result.out)
    for layer in wanted.layers:
        for ours, theirs in zip(
            wanted.layer(layer).tensors, found.layer(layer).tensors, strict=True
        ):
            assert ours is theirs is None or torch.equal(ours, theirs)


@every
def test_imported_and_given_back_unchanged(name, tmp_path):
    base = import_model(FIXTURES / name, tmp_path / "base").out
    adapter = random_adapter(open_quantized(base), tmp_path / "adapter", "scales", size=0)
    merged = merge_adapter(adapter, tmp_path / "merged", base).out
    out = export_model(merged, tmp_path / "out", "original").out
    for path in (FIXTURES / name).iterdir():
        if path.name != "reference.safetensors":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["ct_4bit_g32_sym_bf16", "awq_4bit_g32_asym"])
def test_what_was_trained_is_given_back_to_the_bit(name, tmp_path):
    ids = torch.arange(24)[None]
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32)
    before = model(ids).logits
    trained = get_peft_model(model, QALoRAConfig(r=4, adapt="scales", target_modules="all-linear"))
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.05)
    for _ in range(3):
        trained(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", FIXTURES / name).out
    out = export_model(merged, tmp_path / "out", "original").out
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        wanted = trained.eval()(ids).logits
        assert torch.equal(again(ids).logits, wanted)
    assert (wanted - before).abs().max() > 0.1


@pytest.fixture
def changed(tmp_path):
    """`changed(name, config, tensors)`: a fixture with other entries and tensors."""

    def make(name, config=None, **tensors):
        target = tmp_path / "changed"
        shutil.copytree(FIXTURES / name, target)
        path = target / "config.json"
        values = json.loads(path.read_text())
        values["quantization_config"].update(config or {})
        path.write_text(json.dumps(values))
        state = load_file(target / "model.safetensors")
        for part, change in tensors.items():
            for key in [key for key in state if key.endswith(f".{part}")]:
                state[key] = change(state[key])
        save_file(state, target / "model.safetensors")
        return target

    return make


@pytest.mark.parametrize(
    "name", ["gptq_4bit_g32_sym", "awq_4bit_g32_asym", "autoround_3bit_g32_sym"]
)
def test_scales_in_bf16_are_trained_in_bf16_and_given_back(name, changed, tmp_path):
    base = changed(name, scales=lambda scales: scales.bfloat16())
    module = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.down_proj
    assert module.scales.dtype == torch.bfloat16
    adapter = random_adapter(open_quantized(base), tmp_path / "adapter", "scales", size=0.05)
    merged = merge_adapter(adapter, tmp_path / "merged", base).out
    out = export_model(merged, tmp_path / "out", "original").out
    found, before = (load_file(path / "model.safetensors") for path in (out, base))
    for layer, _ in open_quantized(merged).layers.items():
        scales = found[f"{layer}.scales"]
        assert torch.equal(scales.float(), open_quantized(merged).layer(layer).scales)
        assert not torch.equal(scales, before[f"{layer}.scales"])


@pytest.mark.parametrize("size", [0, 5, 128])
def test_groups_of_another_number_of_inputs_are_refused(size, changed):
    """As far as they go they are k // group_size, as without act-order."""
    base = changed("ct_4bit_g32_asym")
    state = load_file(base / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight_g_idx"] = torch.arange(size, dtype=torch.int32) // 32
    save_file(state, base / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"weight_g_idx: expected int32 .96.*found.*.{size}."
    ):
        open_quantized(base)


def _group(**weights):
    known = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}
    return {"targets": ["Linear"], "weights": known | {"type": "int"} | weights}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"format": "float-quantized", "config_groups": {"g": _group(type="float", num_bits=8)}},
         r"config_groups\['g'\]: 8-bit float weights in format 'float-quantized' are not read"),
        ({"format": "nvfp4-pack-quantized", "config_groups": {"g": _group(type="float")}},
         "4-bit float weights in format 'nvfp4-pack-quantized' are not read"),
        ({"config_groups": {"g": _group(strategy="tensor")}}, "strategy 'tensor'"),
        ({"config_groups": {"g": _group(num_bits=5)}}, "bits must be one of"),
        ({"config_groups": {"g": _group(num_bits=8)}}, r"expected int32 \[64, 24\].*contradicts"),
        ({"config_groups": {"g": _group(group_size=16)}}, "contradicts"),
        ({"config_groups": {"g": _group() | {"targets": ["re:.*mlp.*"]}}}, "no target of conf"),
        ({"config_groups": {"g": _group() | {"targets": ["Linear", 7]}}}, r"targets\.1: expect"),
        ({"config_groups": {"g": _group()}, "sparsity_config": "x"}, "sparsity_config: expected a"),
        ({"config_groups": {"g": _group()}, "transform_config": [1]}, "transform_config: expected"),
        ({"config_groups": {"g": _group() | {"input_activations": {}}}}, "activations"),
        ({"config_groups": {}}, "config_groups: expected an object"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparse-24-bitmask' is not read"),
        ({"transform_config": {"config_groups": {"v": {}}}}, "rotations of the activations"),
    ],
)  # fmt: skip
def test_what_compressed_tensors_has_and_we_do_not_is_refused_by_name(config, message, changed):
    with pytest.raises(CheckpointError, match=message):
        open_quantized(changed("ct_4bit_g32_asym", config))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("awq_4bit_g32_asym", {"version": "gemv"}, "4 bits in version 'gemv' is not read"),
        ("awq_4bit_g32_asym", {"bits": 8}, "AWQ of 8 bits in version 'gemm' is not read"),
        ("awq_4bit_g32_asym", {"group_size": 64}, r"qzeros: expected int32 \[\d+, 8\].*found"),
        ("awq_4bit_g32_asym", {"group_size": 0}, "a positive integer, or -1"),
        ("autoround_8bit_g32_asym", {"bits": 5}, "bits must be one of"),
        ("autoround_8bit_g32_asym", {"bits": 4}, "contradicts the tensors"),
        ("autoround_8bit_g32_asym", {"data_type": "mx_fp"}, "'mx_fp' in packing_format 'auto_rou"),
        ("autoround_8bit_g32_asym", {"act_bits": 8}, "activations of 8 bits"),
        ("autoround_8bit_g32_asym", {"packing_format": "auto_round:fp8"}, "'auto_round:fp8', with"),
        ("autoround_awq_4bit_g32_asym", {"bits": 8}, "AutoRound's 8-bit weights"),
        ("autoround_4bit_g32_asym", {"extra_config": {".*mlp.*": {"bits": 5}}}, "extra_config: "),
    ],
)
def test_what_awq_and_auto_round_have_and_we_do_not_is_refused(name, config, message, changed):
    with pytest.raises(CheckpointError, match=message):
        open_quantized(changed(name, config))


def test_a_layer_that_fills_no_whole_words_is_refused(changed):
    """40 inputs of 4 bits are 5 words, and ours are counted in streams of 32 inputs."""
    cut = {"qweight": lambda t: t[:5], "qzeros": lambda t: t[:2], "scales": lambda t: t[:2]}
    directory = changed(
        "autoround_4bit_g32_asym", **{k: lambda t, f=f: f(t).contiguous() for k, f in cut.items()}
    )
    with pytest.raises(CheckpointError, match=r"whole words of 32 bits, found 40 inputs and"):
        open_quantized(directory)


def test_layers_of_auto_round_with_a_grid_of_their_own(changed):
    """Groups of 32 as two of 64 of equal numbers; the layers are named, or matched."""
    wanted = open_quantized(FIXTURES / "autoround_8bit_g32_asym")
    double = {"scales": lambda t: t[::2].contiguous(), "qzeros": lambda t: t[::2].contiguous()}
    layers = [name for name, spec in wanted.layers.items() if spec.in_features == 64]
    plain = [name for name in wanted.layers if name not in layers]
    config = {"group_size": 64, "extra_config": {plain[0]: {"group_size": 32}}}
    directory = changed("autoround_8bit_g32_asym", config, **double)
    state = load_file(directory / "model.safetensors")
    original = load_file(FIXTURES / "autoround_8bit_g32_asym" / "model.safetensors")
    for part in double:
        state[f"{plain[0]}.{part}"] = original[f"{plain[0]}.{part}"]
    save_file(state, directory / "model.safetensors")
    found = open_quantized(directory)
    assert (found.config.group_size, set(found.config.dynamic)) == (64, {plain[0]})
    assert torch.equal(found.layer(plain[0]).dequantize(), wanted.layer(plain[0]).dequantize())
    (path := directory / "config.json").write_text(path.read_text().replace(plain[0], "down_proj$"))
    assert open_quantized(directory).layers == found.layers


def test_what_is_only_read_is_not_an_export():
    assert {"awq", "auto-round"}.isdisjoint(format.name for format in exports())
    with pytest.raises(ConfigError, match=r"'awq' is read as a base only.*original"):
        export_model(FIXTURES / "awq_4bit_g32_asym", "out", "awq")


def test_words_of_compressed_tensors_before_0_20(changed):
    """They leave bits free in a word that hold no whole code: 3 bits are packed 10 in a word."""
    from qalora_kernels.packing import unpack_columns

    def loosely(packed, columns):
        codes = unpack_columns(packed, 3, columns).to(torch.int64)
        words = -(-columns // 10)
        padded = torch.zeros(len(codes), words * 10, dtype=torch.int64)
        padded[:, :columns] = codes
        packed = (padded.view(len(codes), words, 10) << 3 * torch.arange(10)).sum(2)
        return packed.to(torch.int32)

    dense = open_quantized(FIXTURES / "ct_3bit_g16_asym")
    old = open_quantized(
        changed(
            "ct_3bit_g16_asym",
            weight_packed=lambda t: loosely(t, t.shape[1] * 32 // 3),
            weight_zero_point=lambda t: (
                loosely(t.t().contiguous(), t.shape[0] * 32 // 3).t().contiguous()
            ),
        )
    )
    for name in dense.layers:
        ours, theirs = dense.layer(name), old.layer(name)
        assert torch.equal(ours.qweight, theirs.qweight) and torch.equal(
            ours.offsets, theirs.offsets
        )
        assert torch.equal(old.qweight(name), ours.qweight)


def test_act_order_of_compressed_tensors(tmp_path):
    """weight_g_idx, which versions before 0.20 write: W[n, k] = s[n, g_idx[k]] * (q - z)."""
    plain, target = FIXTURES / "ct_4bit_g32_asym", tmp_path / "act"
    shutil.copytree(plain, target)
    state, wanted = load_file(plain / "model.safetensors"), open_quantized(plain)
    order = {}
    for name, spec in wanted.layers.items():
        order[name] = torch.randperm(spec.in_features, generator=torch.Generator().manual_seed(0))
        state[f"{name}.weight_g_idx"] = (order[name] // spec.group_size).int()
        codes = wanted.layer(name).codes()[:, order[name]].to(torch.int64)
        packed = (codes.unflatten(1, (-1, 8)) << 4 * torch.arange(8)).sum(2)
        state[f"{name}.weight_packed"] = packed.to(torch.int32)
    state[f"{name}.weight_g_idx"].fill_(-1)  # as where it was never set
    state[f"{name}.weight_packed"] = load_file(plain / "model.safetensors")[f"{name}.weight_packed"]
    order[name] = torch.arange(spec.in_features)
    save_file(state, target / "model.safetensors")
    found = open_quantized(target)
    assert found.config.desc_act
    for layer in wanted.layers:
        expected = wanted.layer(layer).dequantize()[order[layer]]
        assert torch.equal(found.layer(layer).dequantize(), expected)
