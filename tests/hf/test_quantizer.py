"""The transformers quantizer: loading, quantizing while loading, saving, and loud failures."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.models import llama
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError, ConfigError, QuantizationError
from qalora_plugin.hf.quantizer import QALoRAQuantizer, register
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.quantize.pipeline import quantize_model
from qalora_plugin.quantize.rtn import rtn
from qalora_plugin.quickstart.embedded import base_model_path

LAYER = "model.layers.0.mlp.down_proj"
IDS = torch.arange(12)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_saved_alike(first, second):
    """The same config, tensors and metadata; safetensors writes metadata in any order."""
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    one, other = (
        safe_open(path / "model.safetensors", "pt").__enter__() for path in (first, second)
    )
    names = list(one.keys())
    assert one.metadata() == other.metadata() and names == list(other.keys())
    assert all(torch.equal(one.get_tensor(name), other.get_tensor(name)) for name in names)


def test_quantized_while_loading_is_rtn_of_the_weights(dense_dir, base_dir):
    dense = load_file(dense_dir / "model.safetensors")
    checkpoint = open_quantized(base_dir)
    for name, spec in checkpoint.layers.items():
        weight = dense[f"{name}.weight"]
        fit = rtn(weight, spec, name=name)
        layer = checkpoint.layer(name)
        assert torch.equal(layer.scales, fit.scales) and torch.equal(layer.offsets, fit.offsets)
    for name in checkpoint.dense_names:
        assert torch.equal(checkpoint.reader.get(name), dense[name]), name


def test_saved_and_loaded_bit_for_bit(base_dir, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(base_dir, output_loading_info=True)
    assert not any(info.values())
    assert model.is_quantized and model.quantization_method == "qalora"
    assert isinstance(model.hf_quantizer, QALoRAQuantizer) and model.hf_quantizer.is_trainable
    assert not getattr(model, "is_loaded_in_4bit", False)  # TRL would cast adapters to bf16
    model.save_pretrained(tmp_path / "again")
    assert_saved_alike(tmp_path / "again", base_dir)


def test_shards_load_too(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(model), logits(again))
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors: missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "shards")


@pytest.mark.parametrize(
    ("dtype", "device_map"), [(torch.float32, None), (torch.bfloat16, "cpu"), (torch.float16, None)]
)
def test_dtype_is_that_of_the_rest(dtype, device_map, base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=dtype, device_map=device_map)
    assert {p.dtype for p in model.parameters()} == {dtype, torch.int32}
    layer = model.get_submodule(LAYER)
    assert layer.scales.dtype == layer.offsets.dtype == torch.float16
    assert model.dtype == dtype and logits(model).dtype == dtype


def test_dtype_while_quantizing_and_without_a_head(dense_dir, base_dir):
    config = QALoRAQuantConfig(bits=3, group_size=16)
    for kind, source, options in (
        (
            AutoModelForCausalLM,
            dense_dir,
            {"quantization_config": config, "torch_dtype": "float32"},
        ),
        (AutoModel, dense_dir, {"quantization_config": config, "dtype": torch.float32}),
        (AutoModel, base_dir, {"dtype": torch.float32}),
        (AutoModelForSequenceClassification, base_dir, {"dtype": torch.float32}),
    ):
        model = kind.from_pretrained(source, **options)
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int32}, kind
        assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 14
        assert all(not tensor.is_meta for tensor in model.state_dict().values())


def test_other_options(dense_dir, tmp_path):
    config = QALoRAQuantConfig(
        bits=2,
        group_size=-1,
        modules_to_not_convert=["v_proj", "model.layers.1.mlp", "0.mlp.gate_proj", "lm_head"],
        dynamic={"*_proj": {"bits": 4}, "down_proj": {"bits": 8, "group_size": 16}},
    )
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    quantized = {n: m.spec for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert len(quantized) == 14 - 2 - 3 - 1
    assert (quantized[LAYER].bits, quantized[LAYER].group_size) == (8, 16)
    up = quantized["model.layers.0.mlp.up_proj"]
    assert (up.bits, up.num_groups) == (4, 1)
    model.save_pretrained(tmp_path / "q")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q")), logits(model))


@pytest.mark.parametrize(
    "entry, left",
    [
        ("mlp", 8),
        ("layers.0.mlp", 11),
        ("model.layers.0", 7),
        ("*.1.self_attn", 10),
        ("self_attn.?_proj", 6),
        ("proj", None),
        ("layers.0.ml", None),
    ],
)
def test_an_entry_names_modules_and_what_is_below_them(entry, left, dense_dir):
    config = QALoRAQuantConfig(modules_to_not_convert=[entry])
    if left is None:
        with pytest.raises(ConfigError, match=f"'{re.escape(entry)}' matches no module"):
            AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
        return
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == left
    config = QALoRAQuantConfig(bits=4, group_size=32, dynamic={entry: {"bits": 8}})
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    bits = [module.spec.bits for module in model.modules() if isinstance(module, QuantLinear)]
    assert bits.count(4) == left and bits.count(8) == 14 - left


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"desc_act": True}, "desc_act orders inputs by calibration data.*qalora quantize MODEL"),
        ({"method": "gptq"}, "method 'gptq' needs calibration data.*qalora quantize MODEL"),
        ({"group_size": 1000}, "group_size 1000 is larger than the inputs of every layer"),
        ({"dynamic": {"mlp": {"group_size": 1000}}}, "group_size 1000 is larger than the inputs"),
    ],
)
def test_what_needs_calibration_or_fits_no_layer_is_refused_while_loading(
    settings, message, dense_dir
):
    config = QALoRAQuantConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)


def test_settings_that_name_nothing(dense_dir, base_dir):
    config = QALoRAQuantConfig(dynamic={"down_proj": {"bits": 8}, "nonsense": {"bits": 2}})
    with pytest.raises(ConfigError, match="'nonsense' matches none of the layers to quantize"):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    order = {"q_proj": {"bits": 8}, "layers.0": {"bits": 2}}  # config.json would have it reversed
    config = QALoRAQuantConfig(dynamic=order)
    with pytest.raises(ConfigError, match=r"'layers\.0' is to count for .*Write '\*q_proj' inst"):
        AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    config = QALoRAQuantConfig(dynamic={"*q_proj": order["q_proj"], "layers.0": order["layers.0"]})
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    assert model.model.layers[0].self_attn.q_proj.spec.bits == 2
    with pytest.raises(ConfigError, match="must be a list of names, found 'down_proj'"):
        QALoRAQuantConfig(modules_to_not_convert="down_proj")  # type: ignore[arg-type]
    # a directory that is quantized says what it is: what its config lists need not be there
    kept = QALoRAQuantConfig(modules_to_not_convert=["lm_head", "vision_tower"])
    AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=kept)
    config = QALoRAQuantConfig(bits=4, modules_to_not_convert=["lm_head"])  # a habit: no head here
    AutoModel.from_pretrained(dense_dir, quantization_config=config)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_variant_of_the_files(shards, dense_dir, base_dir, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(dense_dir)
    size = "1GB" if shards == 1 else "150KB"
    dense.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size=size)
    assert (len(list((tmp_path / "m").glob("model.fp16*.safetensors"))) > 1) == (shards > 1)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m",
        variant="fp16",
        quantization_config=QALoRAQuantConfig(bits=4, group_size=32),
    )
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base_dir)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_minima_are_saved_and_loaded_bit_for_bit(bits, dense_dir, tmp_path):
    config = QALoRAQuantConfig(bits, 32, offsets_at="minimum")
    model = AutoModelForCausalLM.from_pretrained(dense_dir, quantization_config=config)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert again.config.quantization_config.offsets_at == "minimum"
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "second")
    assert_saved_alike(tmp_path / "first", tmp_path / "second")


def test_dequantized_again(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.get_submodule(LAYER)) is torch.nn.Linear
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-6)


def test_registering_twice_changes_nothing():
    from transformers.quantizers.auto import AutoHfQuantizer

    before = AutoHfQuantizer.merge_quantization_configs
    register()
    assert AutoHfQuantizer.merge_quantization_configs is before


WITHOUT_US = """
import sys, transformers
for path in sys.argv[1:]:
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            kind.from_pretrained(path)
        except RuntimeError as error:
            print("refused")
        else:
            print("loaded", path, kind.__name__)
assert "qalora_plugin" not in sys.modules
"""


def test_without_our_package_it_never_loads(base_dir, tmp_path):
    llama(num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    tied = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    )
    tied.save_pretrained(tmp_path / "tied")
    paths = [str(base_dir), str(tmp_path / "tied")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *paths], capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["refused"] * 4, result.stdout + result.stderr
    assert result.returncode == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(paths[1])), logits(tied))


def test_requested_settings_that_contradict_the_directory(base_dir):
    for config in (QALoRAQuantConfig(bits=3, group_size=32), QALoRAQuantConfig(4, 64)):
        with pytest.raises(ConfigError, match="but quantization_config asks for"):
            AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=config)
    minimum = QALoRAQuantConfig(bits=4, group_size=32, offsets_at="minimum")
    with pytest.raises(ConfigError, match=r"with offsets_at=middle, but .*=minimum"):
        AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=minimum)
    for other in ({"desc_act": True}, {"dynamic": {"down_proj": {"bits": 8}}}):
        with pytest.raises(
            ConfigError, match=f"but quantization_config asks for {next(iter(other))}"
        ):
            AutoModelForCausalLM.from_pretrained(
                base_dir, quantization_config=QALoRAQuantConfig(4, 32, **other)
            )
    same = QALoRAQuantConfig(bits=4, group_size=32)
    AutoModelForCausalLM.from_pretrained(base_dir, quantization_config=same)


def edit_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_another_architecture_is_refused(base_dir, altered):
    directory = altered(base_dir)
    edit_config(directory, intermediate_size=128)
    with pytest.raises(CheckpointError, match="down_proj is a linear layer with 172 inputs"):
        AutoModelForCausalLM.from_pretrained(directory)
    edit_config(directory, intermediate_size=172, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.2"):
        AutoModelForCausalLM.from_pretrained(directory)
    edit_config(directory, num_hidden_layers=2, attention_bias=True)
    with pytest.raises(CheckpointError, match=r"no tensor for \S+proj\.bias"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_the_config_of_a_loaded_model_loads_it_again(base_dir):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    again = AutoModelForCausalLM.from_pretrained(base_dir, config=model.config)
    assert torch.equal(logits(model), logits(again))
    config = copy.deepcopy(model.config)
    config.quantization_config.group_size = 16
    with pytest.raises(ConfigError, match="is quantized with group_size=32"):
        AutoModelForCausalLM.from_pretrained(base_dir, config=config)


def test_a_truncated_file_is_refused(base_dir, altered):
    directory = altered(base_dir)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_broken_16_bit_base_is_refused(dense_dir, tmp_path):
    shutil.copytree(dense_dir, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    state[f"{LAYER}.weight"][1, 1] = math.nan
    save_file(state, tmp_path / "m" / "model.safetensors")
    with pytest.raises(QuantizationError, match=rf"{LAYER}: 1 of"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", quantization_config=QALoRAQuantConfig()
        )


def test_nothing_to_quantize_is_an_error(dense_dir, tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel.*nn\.Linear.*4 transformers Conv1D"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "gpt2", quantization_config=QALoRAQuantConfig()
        )
    with pytest.raises(ConfigError, match="excludes all 14"):
        AutoModelForCausalLM.from_pretrained(
            dense_dir, quantization_config=QALoRAQuantConfig(modules_to_not_convert=["model"])
        )


def test_disk_offload_and_state_dicts_are_refused(base_dir):
    with pytest.raises(ConfigError, match="'disk' is not supported"):
        AutoModelForCausalLM.from_pretrained(base_dir, device_map={"": "disk"})
    config = AutoModelForCausalLM.from_pretrained(base_dir).config
    with pytest.raises(ConfigError, match="not from a state_dict"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={"x": torch.ones(1)})


def test_a_model_that_carries_an_adapter_is_not_saved_as_a_base(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    wrapper = torch.nn.Module()
    wrapper.base_layer = model.get_submodule(LAYER)
    model.set_submodule(LAYER, wrapper)
    with pytest.raises(CheckpointError, match="carries an adapter"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("change", [('"weight_map"', '"weight_map'), ("-00002-of", "-00009-of")])
def test_a_damaged_index_is_our_error(change, tmp_path):
    """transformers reads it by itself, before anything is checked."""
    quantize_model(base_model_path(), tmp_path / "out", method="rtn", progress=False)
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(*change))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: .* says"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
