"""What gguf-py makes of an exported file: weights, metadata and tokenizer."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.gguf_files import tokens, write_gguf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qalora_kernels import PackedWeight, QuantSpec
from qalora_plugin import QALoRAConfig, merge_adapter, verify_merge
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, ConfigError, OutputError, VerificationError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.gguf.blocks import Rounding, least_rounding
from qalora_plugin.formats.gguf.metadata import Metadata
from qalora_plugin.formats.gguf.tokenizer import Tokenizer
from qalora_plugin.hub.card import find_subject, make_card
from qalora_plugin.verify.export import verify_export

from .weights import ACT_ORDER, BLOCKS_OF_32, SIZES, error_in_steps, exact_weight

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install '.[export]'")

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read(path):
    """Tensors and metadata of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return {tensor.name: tensor for tensor in reader.tensors}, fields


def gguf_name(name):
    """Name in the file of a layer."""
    _, _, block, part = name.split(".", 3)
    return f"blk.{block}.{PARTS[part]}.weight"


def in_hf_order(weight, heads):
    """Rows of q_proj or k_proj back from rotary pairs to halves."""
    n = weight.shape[0]
    pairs = weight.reshape(heads, n // heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(n, -1)


def dequantized(tensor):
    """A tensor in fp32, by gguf-py."""
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def llama_layer(tensor, name):
    """A layer of a Llama of `SIZES` in fp32, its rows in Hugging Face's order."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.rpartition(".")[2])
    return in_hf_order(dequantized(tensor), heads) if heads else dequantized(tensor)


EXACT = "Exact: integers, scales and minima, bit for bit."
# of the f16 minimum, in steps: at 4 bits half an f16 unit of 8 to 11 steps, below that chosen
ROUNDING = {2: 2e-3, 3: 2e-3, 4: 4e-3}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_equal_to_the_stated_rounding(bits, family, tmp_path):
    source = family(LlamaConfig(**SIZES), bits)
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf")
    tensors, fields = read(result.out)
    assert fields["general.architecture"] == "llama"
    for name in source.layers:
        tensor = tensors[gguf_name(name)]
        held = bits <= 4 and not name.endswith("down_proj")  # of 172 inputs
        assert (name in result.dense) == (not held)
        assert tensor.tensor_type.name == ("Q4_1" if held else "F16")
        weight = llama_layer(tensor, name)
        if held:
            assert error_in_steps(weight, source, name) <= ROUNDING[bits]
        else:
            assert torch.equal(weight, exact_weight(source, name).float().half().float())
    embedding = dequantized(tensors["token_embd.weight"])
    assert torch.equal(embedding, source.reader.get("model.embed_tokens.weight").float())
    assert tensors["output_norm.weight"].tensor_type.name == "F32"


def test_stated_rounding_is_the_measured_one(family, tmp_path):
    source = family(Qwen3Config(**BLOCKS_OF_32))
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf")
    tensors, _ = read(result.out)
    worst = max(
        error_in_steps(dequantized(tensors[gguf_name(name)]), source, name)
        for name in source.layers
    )
    assert f"by at most {worst:.1e} of a step, " in result.exactness
    errors = [least_rounding(source.layer(name)).error for name in source.layers]
    above = sum(int((error > 2e-3).sum()) for error in errors)
    share = 100 * above / sum(error.numel() for error in errors)
    assert above and result.exactness.endswith(f"{share:.1f}% of groups above 0.002.")


def trained_one_step(base, folder):
    """The base with an adapter of scales and offsets, one step of AdamW away from its start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = QALoRAConfig(r=4, adapt="both", task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.arange(64)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_minima_make_it_bit_for_bit(bits, family, tmp_path):
    base = family(Qwen3Config(**BLOCKS_OF_32), bits, offsets_at="minimum")
    trained = trained_one_step(base.directory, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base.directory)
    assert (
        verify_merge(tmp_path / "merged", tmp_path / "adapter", base.directory).max_difference == 0
    )
    source = QuantizedCheckpoint(tmp_path / "merged")
    assert source.config.offsets_at == "minimum"
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf")
    assert (result.layers, result.exactness) == (len(base.layers), EXACT)
    tensors, _ = read(result.out)
    trained.merge_adapter()
    for name in source.layers:
        weight = dequantized(tensors[gguf_name(name)])
        layer = trained.get_submodule(f"base_model.model.{name}").base_layer
        assert torch.equal(weight, layer.packed.dequantize().t())
        changed = exact_weight(base, name) - weight
        assert changed.abs().max() > 1e-4
    report = verify_export(result.out, source.directory)
    assert report.largest_error == 0 and "(bit for bit)" in report.as_text()
    assert EXACT in make_card(find_subject(result.out), "me/model", online=False).text


def test_a_minimum_that_is_off_is_found(family, tmp_path):
    """What verifying allows for the rounding of a minimum, it does not where nothing is rounded."""
    middle = family(Qwen3Config(**BLOCKS_OF_32))
    out = export_model(middle.directory, tmp_path / "model.gguf", "gguf").out
    verify_export(out, middle.directory)
    claimed = family(Qwen3Config(**BLOCKS_OF_32), offsets_at="minimum")
    with pytest.raises(VerificationError, match="differ by more than the rounding of Q4_1"):
        verify_export(out, claimed.directory)


def test_bf16_scales_are_exact_where_f16_holds_them(family, tmp_path):
    source = family(Qwen3Config(**BLOCKS_OF_32), offsets_at="minimum", dtype=torch.bfloat16)
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf")
    assert result.exactness == EXACT
    assert verify_export(result.out, source.directory).largest_error == 0
    spec = QuantSpec(4, 32, 32, 1)
    scale = torch.tensor([[1e-7]]).bfloat16().float()  # MLX's scale of equal weights
    layer = PackedWeight(torch.zeros(4, 1, dtype=torch.int32), scale, scale, None, spec)
    rounding = Rounding()
    rounding.add(layer)
    assert "Integers are exact; minima and scales are rounded to f16" in rounding.as_text()
    assert rounding.largest > 1


def test_no_q4_1_block_holds_every_group_to_2e_3_of_a_step():
    """The example of docs/export.md: every f16 scale and minimum, both directions of codes."""
    s, o = 1.25, 2.0**-8
    q = torch.arange(16, dtype=torch.float64)
    exact = s * (q - 8) + o
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].double()
    best = float("inf")
    for codes in (q, 15 - q):
        for d in every[(every.abs() - s).abs() < 0.01]:  # another d is wrong by 0.07 of a step
            rest = exact - d * codes
            middle = (rest.max() + rest.min()) / 2  # the best minimum, were it any number
            nearby = every[(every - middle).abs() < 0.1]
            worst = (rest - nearby[:, None]).abs().amax(1).min().item() / s
            best = min(best, worst)
    assert best == 2.0**-8 / s > 3e-3
    spec = QuantSpec(4, 32, 32, 1)
    numbers = (torch.tensor([[value]]) for value in (s, o))
    layer = PackedWeight(torch.zeros(4, 1, dtype=torch.int32), *numbers, None, spec)
    assert least_rounding(layer).error.item() == best


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_holds_every_layer_in_fp32(bits, family, tmp_path):
    source = family(LlamaConfig(**SIZES), bits)
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf", exact=True)
    assert (result.layers, set(result.dense)) == (0, set(source.layers))
    tensors, fields = read(result.out)
    assert fields["general.file_type"] == gguf.LlamaFileType.ALL_F32
    for name in source.layers:
        tensor = tensors[gguf_name(name)]
        assert tensor.tensor_type.name == "F32"
        assert error_in_steps(llama_layer(tensor, name), source, name) < 1e-5
    assert verify_export(result.out, source.directory).largest_error < 1e-5


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, Gemma2Config])
def test_families(config, family, tmp_path):
    scale = {"query_pre_attn_scalar": 16} if config is Gemma2Config else {}
    source = family(config(**SIZES, **scale))
    export_model(source.directory, tmp_path / "model.gguf", "gguf")
    tensors, fields = read(tmp_path / "model.gguf")
    name = "model.layers.0.self_attn.q_proj"
    weight = dequantized(tensors[gguf_name(name)])  # not permuted
    assert error_in_steps(weight, source, name) <= ROUNDING[4]
    architecture = fields["general.architecture"]
    assert fields[f"{architecture}.attention.key_length"] == 16
    norm = source.reader.get("model.norm.weight").float()
    expected = norm + 1 if architecture == "gemma2" else norm
    assert torch.equal(dequantized(tensors["output_norm.weight"]), expected)
    assert all(tensor.name for tensor in tensors.values())
    biases = [n for n in source.dense_names if n.endswith("q_proj.bias")]
    assert bool(biases) == ("blk.0.attn_q.bias" in tensors) == (config is Qwen2Config)


def test_tokenizer_is_the_models(family, tmp_path):
    source = family(LlamaConfig(**SIZES))
    export_model(source.directory, tmp_path / "model.gguf", "gguf")
    _, fields = read(tmp_path / "model.gguf")
    stored = json.loads((source.directory / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert {token: i for i, token in enumerate(tokens)} == stored["model"]["vocab"]
    assert len(fields["tokenizer.ggml.merges"]) == len(stored["model"]["merges"])
    types = fields["tokenizer.ggml.token_type"]
    assert [types[i] for i in (0, 1, 2, 3)] == [3, 3, 3, 1]  # control, normal
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_unknown_split_is_refused(family, tmp_path):
    source = family(LlamaConfig(**SIZES))
    path = source.directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split]}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="mis-tokenize"):
        export_model(source.directory, tmp_path / "model.gguf", "gguf")
    assert not any(tmp_path.iterdir())


def test_act_order_becomes_f16(tmp_path):
    source = open_quantized(with_tokenizer_of_its_size(tmp_path / "model"))
    result = export_model(source.directory, tmp_path / "model.gguf", "gguf")
    assert (result.layers, set(result.dense)) == (0, set(source.layers))
    tensors, _ = read(result.out)
    name = next(name for name in source.layers if name.endswith("v_proj"))
    found = dequantized(tensors[gguf_name(name)]).numpy()
    np.testing.assert_array_equal(found, exact_weight(source, name).float().half().float())


def with_tokenizer_of_its_size(target):
    """The act-order fixture, whose vocabulary is small, with a tokenizer that fits."""
    shutil.copytree(ACT_ORDER, target)
    vocab = {chr(97 + i): i for i in range(8)}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
    }
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    return target


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_rope_scaling(kind, tmp_path):
    rope = {
        "rope_type": kind,
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope, max_position_embeddings=2048)
    config.save_pretrained(tmp_path)
    reader = SimpleNamespace(config=config.to_dict())
    factors = Metadata(SimpleNamespace(directory=tmp_path, reader=reader)).rope_factors()
    if kind == "linear":
        assert factors is None
        return
    plain = 5e5 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    scaled = LlamaRotaryEmbedding(config).inv_freq.double()
    torch.testing.assert_close(plain / factors.double(), scaled, rtol=1e-6, atol=0)


def test_places_that_are_taken_or_wrong(quantized, tmp_path):
    source = quantized(4).directory
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        export_model(source, tmp_path / "model.gguf", "gguf")
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        export_model(source, tmp_path / "model", "gguf")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        export_model(source, tmp_path / "other.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_model_card_of_a_file(family, tmp_path):
    source = family(LlamaConfig(**BLOCKS_OF_32))
    rounded = "7 matrices are Q4_1. Integers and scales are exact; minima are rounded to f16: by at"
    for exact, wanted in ((False, rounded), (True, "Exact to the rounding of fp32")):
        path = tmp_path / f"model-{exact}.gguf"
        export_model(source.directory, path, "gguf", exact=exact)
        subject = find_subject(path)
        card = make_card(subject, "someone/model", online=False)
        assert subject.files() == {path.name: path}
        assert wanted in card.text and f"-m {path.name}" in card.text
        assert "| bits | 4 |" in card.text and card.data.library_name == "gguf"


def test_inspect_reads_gguf(
    family,
    tmp_path,
    capsys,
):
    source = family(LlamaConfig(**SIZES)).directory
    command = ["export", str(source), "--format", "gguf", "--exact", "--out"]
    assert main([*command, str(tmp_path / "m.gguf")]) == 0
    assert "all of them dense (fp32 was asked for). Exact to" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "m.gguf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["format"], found["bits"]) == ("export", "gguf", 4)
    (tmp_path / "m.gguf").write_bytes(b"x" * 64)
    assert main(["inspect", str(tmp_path / "m.gguf")]) == 1
    assert "cannot be read as GGUF" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "tokenizer.json: not valid JSON"),
        ("{}", "tokenizer.json: model: missing"),
        ('{"model": {"type": "BPE", "merges": [], "vocab": {"a": "b"}}}', "vocab.a: expected"),
        ('{"model": {"type": "BPE", "merges": [], "vocab": {"a": -1}}}', "vocab.a: expected"),
        ('{"model": {}, "added_tokens": [{}]}', "added_tokens.0.id: missing"),
        (
            '{"model": {"merges": [], "vocab": {}}, "pre_tokenizer": {"type": "Split"}}',
            "splits text by",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(text, message, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path, 8)


def test_tokenizers_of_transformers_own_conversion_are_mended(family, tmp_path, caplog):
    """It writes byte_fallback into a byte-level tokenizer, and bos as eos: llama.cpp would fail."""
    names = tokens()[0]
    write_gguf(tmp_path / "model.gguf")
    made = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert made.eos_token == made.bos_token == "<|user|>"
    sizes = BLOCKS_OF_32 | {"vocab_size": len(names), "eos_token_id": 0, "bos_token_id": 1}
    source = family(LlamaConfig(**sizes)).directory
    made.save_pretrained(source)
    assert json.loads((source / "tokenizer.json").read_text())["model"]["byte_fallback"]
    export_model(source, tmp_path / "out.gguf", "gguf")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "out.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and "tokenizer.ggml.scores" not in fields
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.bos_token_id"]) == (0, 1)
    assert "eos and bos are one token, 1, and config.json says that eos is 0" in caplog.text
    values = json.loads((source / "tokenizer.json").read_text())
    values["pre_tokenizer"] = None
    (source / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"lacks 256 of the 256 tokens of bytes"):
        export_model(source, tmp_path / "other.gguf", "gguf")
