"""A model from disk to a quantized checkpoint, over architectures and settings."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.architectures import ARCHITECTURES, save, token_ids
from support.models import llama

from qalora_kernels import QuantSpec
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.fingerprint import fingerprint
from qalora_plugin.errors import CheckpointError, ConfigError, OutputError, QuantizationError
from qalora_plugin.files.manifest import check_manifest
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.quantize import shards
from qalora_plugin.quantize.gptq import Hessian, calibrated_error
from qalora_plugin.quantize.pipeline import quantize_model
from qalora_plugin.quantize.rtn import rtn
from qalora_plugin.quantize.source import ModelSource
from qalora_plugin.quickstart.embedded import base_model_path


def _load(directory, **kwargs):
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, **kwargs).eval()


def _quantize(source, out, **kwargs):
    if kwargs.get("method", "gptq") == "gptq":
        kwargs.setdefault("calibration", token_ids())
        kwargs.setdefault("seq_len", 12)
    return quantize_model(source, out, progress=False, **{"group_size": 16, **kwargs})


def _logits(model):
    with torch.no_grad():
        output = model(input_ids=token_ids(3))
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize(
    "name, method",
    [
        *((name, "gptq") for name in ARCHITECTURES),
        # without calibration there is no forward, only names: those that differ from the model's
        *((name, "rtn") for name in ("gemma3_multimodal", "bert_classifier", "t5_encoder")),
    ],
)
def test_every_architecture(name, method, tmp_path):
    source = save(name, tmp_path / "source")
    result = _quantize(source, tmp_path / "out", bits=8, method=method)
    original, quantized = _load(source), _load(result.out)
    layers = {n for n, m in quantized.named_modules() if isinstance(m, QuantLinear)}
    stored = set(open_quantized(result.out).layers)
    assert stored == set(result.layers)
    if name != "gemma3_multimodal":  # whose files name modules otherwise than the model does
        assert stored == layers
    assert len(stored) == len(layers)
    heads = {n for n, m in quantized.named_modules() if isinstance(m, torch.nn.Linear)}
    assert heads == set(result.kept)
    integers = ((n, m.qweight) for n, m in quantized.named_modules() if isinstance(m, QuantLinear))
    assert open_quantized(result.out).config.base["fingerprint"] == fingerprint(integers)
    want, got = _logits(original), _logits(quantized)
    assert (got - want).norm() < 0.03 * want.norm()
    # what stays in 16 bits is copied bit for bit
    states = original.state_dict(), quantized.state_dict()
    for key, value in states[1].items():
        if key.rpartition(".")[0] not in layers:
            assert torch.equal(value, states[0][key]), key


def test_inputs_come_from_the_quantized_layers_before(llama_dir, tmp_path):
    """Each layer must be solved on what it will see: everything before it quantized."""
    result = _quantize(llama_dir, tmp_path / "out", bits=3)
    model, checkpoint = _load(llama_dir), open_quantized(result.out)
    order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    names = sorted(result.layers, key=lambda n: (n.split(".")[2], order.index(n.split(".")[-1])))
    for name in names:
        linear, layer = model.get_submodule(name), checkpoint.layer(name)
        hessian = Hessian(linear.in_features)
        handle = linear.register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0]))
        with torch.no_grad():
            model(input_ids=token_ids())
        handle.remove()
        error = calibrated_error(linear.weight, layer, hessian.mean(name))
        assert result.layers[name]["error"] == pytest.approx(error, rel=2e-3)
        linear.weight = torch.nn.Parameter(layer.dequantize().t())


def test_gptq_beats_rtn_on_the_calibration_text(tmp_path):
    source = base_model_path()
    text = ["def area(radius):\n    return math.pi * radius ** 2\n\n" * 20]
    common = {"bits": 2, "group_size": 128, "progress": False}
    common["modules_to_not_convert"] = ["layers.2", "layers.3"]  # two of four blocks will do
    windows = {"calibration": text, "seq_len": 64, "samples": 4}
    solved = quantize_model(source, tmp_path / "gptq", **windows, **common)
    free = quantize_model(source, tmp_path / "rtn", method="rtn", **common)
    original, gptq, nearest = (_load(path) for path in (source, solved.out, free.out))
    tokenizer = transformers.AutoTokenizer.from_pretrained(solved.out)
    ids = tokenizer(text[0], return_tensors="pt")["input_ids"][:, :200]
    with torch.no_grad():
        want = original(input_ids=ids).logits.float()
        errors = [(m(input_ids=ids).logits.float() - want).norm() for m in (gptq, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_the_directory_is_complete(tmp_path):
    result = quantize_model(base_model_path(), tmp_path / "out", method="rtn", progress=False)
    names = {path.name for path in result.out.iterdir()}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not [name for name in names if "part" in name]
    assert check_manifest(result.out)
    config = json.loads((result.out / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["lm_head"]
    base = quantization["base"]
    assert len(base.pop("fingerprint")) == 32
    assert base == {"name_or_path": "base_model", "zero_points": "real"}
    weight_map = json.loads((result.out / "model.safetensors.index.json").read_text())["weight_map"]
    blocks = {
        shard: {name.split(".")[2] for name, file in weight_map.items() if file == shard}
        for shard in set(weight_map.values())
    }
    assert sorted(len(found) for found in blocks.values()) == [1] * config["num_hidden_layers"] + [
        len({"weight"})
    ]
    assert not list(tmp_path.glob(".*"))  # no partial directory is left


@pytest.mark.parametrize(
    "bits, group_size, desc_act",
    [(2, 8, True), (3, 43, False), (4, -1, True), (4, 5, False), (8, 30, True)],
)
def test_grids(bits, group_size, desc_act, llama_dir, tmp_path):
    result = _quantize(
        llama_dir, tmp_path / "out", bits=bits, group_size=group_size, desc_act=desc_act
    )
    checkpoint = open_quantized(result.out)
    for name, spec in checkpoint.layers.items():
        layer = checkpoint.layer(name)
        assert layer.scales.shape == (spec.num_groups, spec.out_features)
        assert (layer.g_idx is not None) == desc_act
    assert _logits(_load(result.out)).isfinite().all()


def test_integer_zero_points_and_stock_formats(tmp_path):
    source = tmp_path / "source"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}
    llama(vocab_size=96, **sizes).save_pretrained(source)
    ours = _quantize(source, tmp_path / "ours", zero_points="integer")
    checkpoint = open_quantized(ours.out)
    for name, spec in checkpoint.layers.items():
        layer = checkpoint.layer(name)
        zeros = spec.mid - layer.offsets.double() / layer.scales.double()
        assert torch.equal(zeros, zeros.round())
    want = _logits(_load(ours.out))
    for format in ("gptq", "gptq_v2"):
        stock = _quantize(source, tmp_path / format, format=format)
        method = json.loads((stock.out / "config.json").read_text())["quantization_config"]
        assert method["quant_method"] == "gptq" and method["checkpoint_format"] == format
        assert torch.equal(_logits(_load(stock.out)), want)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_minima_in_fp16(method, llama_dir, tmp_path):
    settings = {"method": method, "dynamic": {"*.v_proj": {"bits": 2}}}
    plain = open_quantized(_quantize(llama_dir, tmp_path / "plain", **settings).out)
    assert "offsets_at" not in plain.reader.config["quantization_config"]
    out = _quantize(llama_dir, tmp_path / "out", offsets_at="minimum", **settings).out
    stored = open_quantized(out)
    bytes_of = [{n: t.nbytes for n, t in m.reader.tensors.items()} for m in (plain, stored)]
    assert bytes_of[0] == bytes_of[1]
    written = stored.reader.config["quantization_config"]
    assert (written["offsets_at"], written["offsets_dtype"]) == ("minimum", "float16")
    for name, spec in stored.layers.items():
        layer = stored.layer(name)
        minima = layer.offsets - spec.mid * layer.scales
        assert torch.equal(stored.reader.get(f"{name}.offsets").float(), minima)
    _load(out).save_pretrained(tmp_path / "again")
    again = open_quantized(tmp_path / "again")
    for name in stored.reader.tensors:
        assert torch.equal(again.reader.get(name), stored.reader.get(name)), name


def test_overrides_and_kept_layers(llama_dir, tmp_path):
    result = _quantize(
        llama_dir,
        tmp_path / "out",
        method="rtn",
        dynamic={"down_proj": {"bits": 8, "group_size": 43}},
        modules_to_not_convert=["o_proj", "layers.1.self_attn", "lm_head", "embed_tokens"],
    )
    assert result.layers["model.layers.1.mlp.down_proj"]["bits"] == 8
    assert result.layers["model.layers.1.mlp.up_proj"]["bits"] == 4
    assert "model.layers.0.self_attn.o_proj" in result.kept and "lm_head" in result.kept
    assert "model.layers.1.self_attn.q_proj" in result.kept
    model = _load(result.out)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert model.model.layers[0].mlp.down_proj.spec.group_size == 43


def test_a_model_in_memory(llama_dir, tmp_path):
    model = _load(llama_dir)
    from_disk = _quantize(llama_dir, tmp_path / "disk")
    from_memory = _quantize(model, tmp_path / "memory")
    for path in from_disk.out.glob("*.safetensors"):
        assert path.read_bytes() == (from_memory.out / path.name).read_bytes()
    config = json.loads((from_memory.out / "config.json").read_text())
    assert config["quantization_config"]["base"]["name_or_path"] == "llama"
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="NaN"):
        _quantize(model, tmp_path / "damaged", method="rtn")
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "memory"}


def test_a_peft_model_is_refused(llama_dir, tmp_path):
    adapted = get_peft_model(_load(llama_dir), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="found a PeftModel"):
        _quantize(adapted, tmp_path / "out", method="rtn")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_that_came_from_above(llama_dir, tmp_path, monkeypatch):
    """Its copy is made beside the result, whatever the path that it was loaded from."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = _load(llama_dir)
    model.name_or_path = ".."
    made = _quantize(model, tmp_path / "here" / "out", method="rtn")
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {
        path.name for path in made.out.glob("*.safetensors")
    }
    assert not (tmp_path / "here" / "config.json").exists()


def test_text_without_a_tokenizer_is_refused(llama_dir, tmp_path):
    with pytest.raises(CheckpointError, match="expected a tokenizer beside the model"):
        _quantize(llama_dir, tmp_path / "out", calibration=["text"])
    with pytest.raises(ConfigError, match=r"a model in memory brings no tokenizer .* tokenizer="):
        _quantize(_load(llama_dir), tmp_path / "out", calibration=["text"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_one_block_in_memory_at_a_time(method, llama_dir, tmp_path, monkeypatch):
    held = []
    original = shards.pack_layer

    def pack_layer(name, weight):
        real = [n for n, p in models[0].named_parameters() if not p.is_meta]
        held.append((name, real))
        return original(name, weight)

    models = []
    check = ModelSource._check_complete
    monkeypatch.setattr(
        ModelSource, "_check_complete", lambda self: models.append(self.model) or check(self)
    )
    monkeypatch.setattr(shards, "pack_layer", pack_layer)
    _quantize(llama_dir, tmp_path / "out", method=method)
    assert len(held) == 14
    for name, real in held:
        block = name.split(".")[:3]
        assert all(other.split(".")[:3] == block for other in real), name
        assert bool(real) == (method == "gptq")


def test_half_precision_shards(tmp_path):
    source = save("llama", tmp_path / "source", torch.bfloat16, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    result = _quantize(source, tmp_path / "out", bits=8)
    want = _logits(_load(source, dtype=torch.float32))
    assert (_logits(_load(result.out, dtype=torch.float32)) - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"group_size": 64}, r"group_size 64 is larger than .* \(at most 43\)"),
        ({"format": "gptq"}, "multiples of 32"),
        ({"format": "gptq", "dynamic": {"*.q_proj": {"bits": 8}}}, "one grid for all layers"),
        ({"format": "gptq", "group_size": 20}, r"group_size 20: GPTQModel loads .* \[-1, 16, 32"),
        ({"device": "foo"}, "device 'foo' cannot be used"),
        ({"seq_len": 4096, "calibration": ["text"]}, "seq_len 4096 is more than the 2048"),
        ({"dynamic": {"*.nothing": {"bits": 8}}}, "matches none of the layers"),
        ({"modules_to_not_convert": ["*"]}, "excludes all"),
        ({"modules_to_not_convert": ["donw_proj"]}, "'donw_proj' matches no module"),
        ({"modules_to_not_convert": [""]}, "'' matches no module"),
    ],
)
def test_bad_settings_write_nothing(settings, message, llama_dir, tmp_path):
    with pytest.raises(ConfigError, match=message):
        _quantize(llama_dir, tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_sources_that_cannot_be_quantized(tmp_path):
    source = save("llama", tmp_path / "source")
    quantized = _quantize(source, tmp_path / "quantized", method="rtn").out
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"is quantized already \(qalora\)"):
        _quantize(quantized, tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a directory"):
        _quantize(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "quantized" / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"a file in format gguf.*qalora import"):
        _quantize(tmp_path / "quantized" / "model.gguf", tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "of tomorrow"}))
    with pytest.raises(CheckpointError, match="a model whose class transformers has"):
        _quantize(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj"):
        _quantize(source, tmp_path / "out")
    tensors["model.layers.1.mlp.up_proj.weight"] = lost[:-1].contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: expected shape \[43, 32\]"):
        _quantize(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_architectures_that_cannot_be_quantized(tmp_path):
    common = {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**common)).save_pretrained(tmp_path / "g")
    with pytest.raises(ConfigError, match="Conv1D"):
        _quantize(tmp_path / "g", tmp_path / "out", method="rtn")
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="encoder-decoder"):
        _quantize(tmp_path / "t5", tmp_path / "out", method="rtn")


def test_a_taken_output_is_refused(llama_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        _quantize(llama_dir, out, method="rtn")
    assert (out / "notes.txt").read_text() == "mine"


def test_damaged_weights_are_named(tmp_path):
    source = save("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][2, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for method in ("rtn", "gptq"):
        with pytest.raises(QuantizationError, match=r"layers\.1\.self_attn\.v_proj.*NaN"):
            _quantize(source, tmp_path / method, method=method)
        assert not (tmp_path / method).exists()


def test_rtn_equals_the_fit_on_tensors(llama_dir, tmp_path):
    result = _quantize(llama_dir, tmp_path / "out", method="rtn")
    name = "model.layers.0.mlp.down_proj"
    weight = load_file(llama_dir / "model.safetensors")[f"{name}.weight"]
    fitted = rtn(weight, QuantSpec(4, 16, 43, 32), name=name).dequantize().t()
    assert torch.equal(_load(result.out).get_submodule(name).packed.dequantize().t(), fitted)
