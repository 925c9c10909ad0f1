"""GGUF files as bases: every number taken over, and the merged model written back."""

import filecmp
import json

import gguf
import numpy as np
import pytest
import torch
from support.adapters import RANK, qalora_tensors, write_adapter
from support.gguf_files import (
    SIZES,
    TEMPLATE,
    random_blocks,
    random_k_blocks,
    write_gguf,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_kernels import packing
from qalora_plugin import QALoRAConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.formats.gguf.decode import read_minima, read_scales, write_words
from qalora_plugin.formats.gguf.headers import BLOCK_TYPES, K_TYPES
from qalora_plugin.formats.gguf.k_quants import read_k
from qalora_plugin.tuner.targets import resolve_targets


def _merged(base, folder, adapt="zeros", factor=1.0, layers=lambda name: True):
    chosen = {name: spec for name, spec in open_quantized(base).layers.items() if layers(name)}
    config = {
        "peft_type": "QALORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": sorted(chosen),
        "adapt": adapt,
    }
    tensors = {key: factor * value for key, value in qalora_tensors(chosen, adapt).items()}
    folder.mkdir(exist_ok=True)
    return merge_adapter(write_adapter(folder / "adapter", config, tensors), folder / "merged").out


def _tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def _weights(path, names):
    """Dequantize by gguf-py, by Hugging Face's names; rows still in llama.cpp's order."""
    stored = _tensors(path)
    return {
        name: torch.from_numpy(
            np.array(gguf.quants.dequantize(stored[own].data, stored[own].tensor_type))
        )
        for name, own in names.items()
    }


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_weight_is_that_of_gguf_py(kind):
    raw, block = random_blocks(kind, 48, 32), BLOCK_TYPES[kind]
    blocks = torch.from_numpy(raw).view(48, 32, block.nbytes)
    scales, minima = read_scales(block, blocks).float(), read_minima(block, blocks).float()
    assert (scales < 0).sum() > 300 and (scales == 0).sum() > 100
    words = torch.empty(32 * block.bits, 48, dtype=torch.int32)
    write_words(block, blocks, words)
    codes = packing.unpack(words, block.bits, 1024).t().reshape(48, 32, 32).float()
    found = scales.unsqueeze(-1) * codes + minima.unsqueeze(-1)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert torch.equal(found.view(48, -1), torch.from_numpy(expected))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_layer_is_what_gguf_py_reads(kind, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind=kind)
    source = open_quantized(path)
    assert len(source.layers) == 14 and source.config.offsets_at == "minimum"
    reader = source.reader
    expected = _weights(path, reader.model.names)
    for name in source.layers:
        weight = expected[f"{name}.weight"]
        order = reader.row_order(f"{name}.weight")
        weight = weight if order is None else weight[order]
        assert torch.equal(source.layer(name).dequantize(torch.float32).t(), weight)
    for name in source.dense_names:
        assert torch.equal(reader.get(name), expected[name])


def test_rows_of_queries_and_keys_are_those_of_transformers(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").state_dict()
    source = open_quantized(path)
    for name in source.layers:
        found = source.layer(name).dequantize(torch.float32).t()
        assert torch.equal(found, theirs[f"{name}.weight"]), name
    for name in source.dense_names:
        assert torch.equal(source.reader.get(name), theirs[name]), name


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_zero_adapter_gives_the_same_bytes(kind, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind=kind)
    base = import_model(path, tmp_path / "base").out
    adapt = "scales" if kind == "Q8_0" else "zeros"
    merged = _merged(base, tmp_path / "m", adapt, factor=0.0)
    result = export_model(merged, tmp_path / "again.gguf", "original")
    assert filecmp.cmp(path, result.out, shallow=False)


@pytest.mark.parametrize("adapt", ["zeros", "both"])
def test_minima_and_scales_alone_change(adapt, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kinds={"attn_v": "Q5_1"})
    merged = _merged(path, tmp_path / "m", adapt, layers=lambda name: "up_proj" not in name)
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    before, after = path.read_bytes(), out.read_bytes()
    stored, changed = _tensors(path), np.zeros(len(before), dtype=bool)
    for name, tensor in stored.items():
        kind = tensor.tensor_type.name
        if kind in ("Q4_1", "Q5_1") and "ffn_up" not in name:
            size = BLOCK_TYPES[kind].nbytes
            first = 0 if adapt == "both" else 2
            for start in range(tensor.data_offset, tensor.data_offset + tensor.n_bytes, size):
                changed[start + first : start + 4] = True
    different = np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8)
    assert different.any() and not different[~changed].any()
    assert _fields(path) == _fields(out)
    _equal_models(out, merged)


def _equal_models(written, merged):
    """The written file, read again, is the merged model."""
    found, wanted = open_quantized(written), open_quantized(merged)
    for name in wanted.layers:
        one, other = (part.layer(name).dequantize(torch.float32) for part in (found, wanted))
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("kind", "grown"), [("Q4_0", "Q4_1"), ("Q5_0", "Q5_1")])
def test_types_without_a_minimum_grow(kind, grown, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind=kind)
    merged = _merged(path, tmp_path / "m", layers=lambda name: "v_proj" in name)
    result = export_model(merged, tmp_path / "again.gguf", "original")
    assert f"2 layers without a minimum grew into {grown}" in result.exactness
    assert _fields(path) == _fields(result.out)
    before, after = _tensors(path), _tensors(result.out)
    assert list(before) == list(after)
    for name, tensor in before.items():
        if "attn_v" in name:
            assert after[name].tensor_type.name == grown
        else:
            assert tensor.tensor_type == after[name].tensor_type
            assert np.array_equal(tensor.data, after[name].data)
    _equal_models(result.out, merged)
    # the type without a minimum takes scales as it is
    scales = _merged(path, tmp_path / "s", "scales")
    again = export_model(scales, tmp_path / "scales.gguf", "original").out
    assert {t.tensor_type.name for t in _tensors(again).values()} == {kind, "F32", "Q8_0"}
    _equal_models(again, scales)


def test_a_file_that_grows_keeps_its_alignment(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q4_0", **{"general.alignment": 256})
    merged = _merged(path, tmp_path / "m")
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    assert all(tensor.data_offset % 256 == 0 for tensor in gguf.GGUFReader(out).tensors)
    _equal_models(out, merged)


def _empty_array(path):
    """Make of the key general.languages an array without entries; gguf-py writes none."""
    raw, entries = (
        path.read_bytes(),
        b"".join(len(word).to_bytes(8, "little") + word for word in (b"en", b"de")),
    )
    head = (9).to_bytes(4, "little") + (8).to_bytes(4, "little")
    full = head + (2).to_bytes(8, "little") + entries
    assert raw.count(full) == 1
    tensors = gguf.GGUFReader(path).data_offset
    before, after = raw[:tensors].split(full)
    start = (before + head + bytes(8) + after).rstrip(b"\0")
    path.write_bytes(start + bytes(-len(start) % 32) + raw[tensors:])


def test_a_file_that_grows_keeps_an_empty_array(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="Q4_0")
    _empty_array(path)
    merged = _merged(path, tmp_path / "m")
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    assert _fields(out) == _fields(path) and _fields(out)["general.languages"] == []
    kind, count = gguf.GGUFReader(out).fields["general.languages"].parts[-2:]
    assert (int(kind[0]), int(count[0])) == (gguf.GGUFValueType.STRING, 0)


@pytest.mark.parametrize("key", ["factor", "scale_linear"])
def test_a_rope_factor_without_a_type_is_linear(key, tmp_path):
    name = {"factor": "llama.rope.scaling.factor", "scale_linear": "llama.rope.scale_linear"}[key]
    path = write_gguf(tmp_path / "model.gguf", **{name: 4.0})
    rope = open_quantized(path).reader.config["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}


def test_the_base_of_sliding_layers_is_the_files_own(tmp_path):
    path = write_gguf(
        tmp_path / "model.gguf", family="gemma3", **{"gemma3.rope.freq_base_swa": 5e3}
    )
    rope = open_quantized(path).reader.config["rope_parameters"]
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 5000.0}


def test_offsets_of_q8_0_are_refused_before_training(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kinds={"ffn_down": "Q8_0"})
    base = import_model(path, tmp_path / "base").out
    model = AutoModelForCausalLM.from_pretrained(base)
    config = QALoRAConfig()
    resolve_targets(config, model)
    assert len(config.target_modules) == 12  # the two down_proj stay frozen
    with pytest.raises(ConfigError, match=r"'gguf', which cannot take that back .Q8_0 has no mini"):
        resolve_targets(QALoRAConfig(target_modules=["down_proj"]), model)
    resolve_targets(QALoRAConfig(target_modules=["down_proj"], adapt="scales"), model)
    merged = _merged(base, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"down_proj: its offsets have changed, and Q8_0"):
        export_model(merged, tmp_path / "again.gguf", "original")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize("kind", K_TYPES)
def test_k_quants_are_decoded(kind):
    raw, layout = random_k_blocks(kind, 40, 4), K_TYPES[kind]
    words, scales, minima = read_k(kind, torch.from_numpy(raw))
    codes = packing.unpack(words.t().contiguous(), layout.bits, 1024).t().float()
    steps, lowest = (part.repeat_interleave(layout.group_size, 1) for part in (scales, minima))
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert torch.equal(steps * codes + lowest, torch.from_numpy(expected))


@pytest.fixture
def wide(monkeypatch):
    """Have files written with 256 inputs everywhere, as K-quants need them."""
    for name, value in (("width", 256), ("ff", 256), ("head_dim", 64)):
        monkeypatch.setitem(SIZES, name, value)


def test_a_file_of_k_quants_goes_to_other_formats(wide, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kinds={"ffn_down": "Q6_K"}, kind="Q4_K")
    source = open_quantized(path)
    expected = _weights(path, source.reader.model.names)
    for name in source.layers:
        found, weight = source.layer(name), expected[f"{name}.weight"]
        order = source.reader.row_order(f"{name}.weight")
        weight = weight if order is None else weight[order]
        ulp = 2.0**-24 * found.offsets.abs().max()  # the offset is a sum, rounded to fp32
        assert (found.dequantize(torch.float32).t() - weight).abs().max() <= 2 * ulp
    base = import_model(path, tmp_path / "base").out
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(
        ConfigError, match=r"K-quants round theirs.*Set write_back=False.*gguf, mlx"
    ):
        resolve_targets(QALoRAConfig(), model)
    config = QALoRAConfig(write_back=False)
    resolve_targets(config, model)
    assert len(config.target_modules) == 14
    merged = _merged(base, tmp_path / "m")
    with pytest.raises(CheckpointError, match="its offsets have changed, and the source's format"):
        export_model(merged, tmp_path / "again.gguf", "original")
    assert export_model(merged, tmp_path / "other.gguf", "gguf").layers == 12  # Q6_K as F16
    zero = _merged(base, tmp_path / "z", factor=0.0)
    same = export_model(zero, tmp_path / "same.gguf", "original").out
    assert filecmp.cmp(path, same, shallow=False)


def test_k_quants_beside_other_types_stay_dense(wide, tmp_path):
    kinds = {"ffn_up": "Q4_K", "ffn_gate": "F16", "token_embd": "Q6_K"}
    path = write_gguf(tmp_path / "model.gguf", kinds=kinds, kind="Q5_0")
    source = open_quantized(path)
    assert len(source.layers) == 10 and source.config.scales_dtype == "float16"
    mlp = "model.layers.0.mlp"
    assert source.reader.info(f"{mlp}.gate_proj.weight").dtype == torch.float16
    assert source.reader.info(f"{mlp}.up_proj.weight").dtype == torch.float32
    merged = _merged(path, tmp_path / "m")
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    _equal_models(out, merged)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_families(family, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", family=family)
    source = open_quantized(path)
    base = import_model(path, tmp_path / "base").out
    merged = _merged(base, tmp_path / "m", factor=0.0)
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    assert filecmp.cmp(path, out, shallow=False)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if family == "gemma":
        return  # transformers does not read its GGUF files
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", **({} if family == "qwen2" else {"head_dim": 16})
    ).eval()
    assert type(model) is type(theirs)
    state = theirs.state_dict()
    for layer in theirs.model.layers:  # transformers takes 256 for Gemma; llama.cpp head_dim
        layer.self_attn.scaling = 16**-0.5
    for name in source.dense_names:
        assert torch.equal(source.reader.get(name).float(), state[name]), name
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-4


def test_an_export_of_the_file_itself_brings_the_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "model.gguf")
    out = export_model(path, tmp_path / "mlx", "mlx").out
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    with pytest.raises(CheckpointError, match=r"model.gguf: is a GGUF file already.*qalora import"):
        export_model(path, tmp_path / "again.gguf", "gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not read; llama"),
        ({"tokenizer.ggml.pre": "command-r"}, "tokenizer.ggml.pre 'command-r' is not read"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5' is not read"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.dimension_count": 8}, "partial rotary embedding"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not read"),
        ({"llama.rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0.*only 32.0 is read"),
        ({"llama.rope.scaling.attn_factor": 0.5}, "attn_factor is 0.5"),
        ({"llama.feed_forward_length": [96, 96]}, "expected one number, found a list"),
        ({"llama.block_count": 3}, r"no tensor blk.2.*The file is incomplete"),
        ({"llama.block_count": 1 << 20}, r"block_count: expected at most .*found 1048576"),
        ({"tokenizer.ggml.token_type": [1]}, r"token_type: expected a value for each .*found 1\."),
        ({"llama.attention.head_count": 0}, r"no llama model .*ZeroDivisionError"),
        ({"llama.attention.head_count_kv": [2, 2]}, r"no llama model .*num_key_value_heads"),
        ({"llama.context_length": "x"}, r"no llama model .*max_position_embeddings.*got str"),
        ({"tokenizer.ggml.eot_token_id": [1]}, r"eot_token_id: expected the number .*found \[1\]"),
    ],
)
def test_refused_by_name(fields, message, tmp_path):
    family = fields.pop("general.architecture", "llama")
    with pytest.raises(CheckpointError, match=message):
        open_quantized(write_gguf(tmp_path / "model.gguf", family=family, **fields))


def test_inspect_says_what_it_is(tmp_path, capsys):
    path = write_gguf(tmp_path / "model.gguf", kinds={"ffn_down": "Q8_0"})
    assert cli(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "gguf model" and found["valid"]
    assert found["layers_written_back"] == {"zeros": 12, "scales": 14, "both": 12}
    assert found["types"] == "F32: 5, Q4_1: 12, Q8_0: 3"


def test_files_that_are_not_read(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", kind="F16")
    with pytest.raises(CheckpointError, match=r"none of its layers.*llama-quantize"):
        open_quantized(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        open_quantized(path)
