"""No export drops a feature of the model: what a runtime does not read is refused by name."""

import json
import shutil

import pytest
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint
from qalora_plugin.checkpoint.format import format_named
from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.features import all_settings, period_of, windowed_layers
from qalora_plugin.formats.gguf.metadata import Metadata

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
SIZES |= {"vocab_size": 2048, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 8}
LONG |= {"long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
}
CLASSIFIER = {"architectures": ["LlamaForSequenceClassification"]}
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 512}
REFUSED = [
    ("gguf mlx", MistralConfig, {"sliding_window": 16}, "sliding_window 16"),
    ("gguf mlx", Qwen2Config, SLIDING, "sliding_window 16"),
    ("gguf mlx", Qwen3Config, SLIDING, "sliding_window 16"),
    ("mlx", Gemma2Config, GEMMA | {"sliding_window": 16}, "sliding_window 16"),
    ("gguf mlx onnx", LlamaConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gguf mlx onnx", LlamaConfig, {"rope_parameters": LONG}, "rope_type 'longrope'"),
    ("onnx", LlamaConfig, {"rope_parameters": YARN}, "rope_type 'yarn'"),
    ("gguf mlx", LlamaConfig, {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast=16"),
    ("gguf mlx", LlamaConfig, {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_f"),
    ("gguf mlx onnx", Qwen3Config, {"attention_bias": True}, "attention_bias is True"),
    ("gguf mlx", Qwen2Config, {"head_dim": 32}, "head_dim is 32"),
    ("onnx", LlamaConfig, {"head_dim": 24}, "heads of 24 numbers cannot be run"),
    ("mlx", GemmaConfig, {}, "hidden_act is 'gelu_pytorch_tanh'"),
    ("gguf", GemmaConfig, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("gguf mlx", Gemma2Config, GEMMA | {"attn_logit_softcapping": None}, "is null|capping is None"),
    ("gguf mlx", Gemma3TextConfig, GEMMA | {"final_logit_softcapping": 2.0}, "capping is 2.0"),
    ("gguf", Gemma3TextConfig, {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64"),
    ("mlx", Gemma3TextConfig, GEMMA | {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("gguf", Gemma3TextConfig, GEMMA | {"layer_types": windowed_layers(2, 2)}, "layer_types"),
    ("gguf", Gemma3TextConfig, GEMMA | {"rope_parameters": BY_KIND}, "rope_theta of sliding"),
    ("gguf mlx onnx", PhiConfig, {}, "model_type 'phi'"),
    ("onnx", Gemma3TextConfig, GEMMA, "model_type 'gemma3_text'"),
    ("gguf mlx onnx", LlamaConfig, CLASSIFIER, "is no causal language model"),
]
CASES = [(name, *rest) for formats, *rest in REFUSED for name in formats.split()]


@pytest.fixture
def model(quantized, tmp_path):
    """`model(config, ...)`: a quantized directory with the config.json of another model."""

    def make(config, **extra):
        directory = shutil.copytree(quantized(4).directory, tmp_path / "model")
        quantization = json.loads((directory / "config.json").read_text())["quantization_config"]
        settings = config.to_dict() | {"quantization_config": quantization} | extra
        (directory / "config.json").write_text(json.dumps(settings))
        return QuantizedCheckpoint(directory)

    return make


def check(source, name):
    """Ask a format whether its runtime computes what the model does."""
    return Metadata(source) if name == "gguf" else format_named(name).module("write").check(source)


@pytest.mark.parametrize(("name", "kind", "settings", "why"), CASES)
def test_what_the_runtime_does_not_read_is_refused(name, kind, settings, why, model):
    with pytest.raises(CheckpointError, match=why) as caught:
        check(model(kind(**SIZES | settings)), name)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["gguf", "mlx", "onnx"])
def test_a_window_that_is_never_full_changes_nothing(name, model):
    check(model(MistralConfig(**SIZES, sliding_window=512)), name)


def test_onnx_runtime_is_told_of_windows(model):
    check(model(MistralConfig(**SIZES, sliding_window=16)), "onnx")


@pytest.mark.parametrize("name", ["mlx", "onnx"])
def test_what_transformers_ignores_is_not_written(name, model):
    stray = {"sliding_window": 16, "layer_types": ["sliding_attention"] * 2, "rope_traditional": 1}
    found = all_settings(check(model(LlamaConfig(**SIZES), **stray), name))
    assert not found.keys() & stray.keys()


def test_defaults_are_written_out(model):
    source = model(LlamaConfig(**SIZES, rope_parameters=YARN))
    path = source.directory / "config.json"
    stated = json.loads(path.read_text())
    del stated["tie_word_embeddings"]  # mlx-lm would take true
    path.write_text(json.dumps(stated))
    found = all_settings(check(source, "mlx"))
    assert found["tie_word_embeddings"] is False
    assert found["rope_parameters"]["original_max_position_embeddings"] == 512
    assert AutoConfig.for_model(**found).rope_parameters == found["rope_parameters"]


def test_periods_of_layers():
    assert period_of(windowed_layers(12, 6)) == 6 and period_of(windowed_layers(7, 2)) == 2
    assert period_of(["full_attention"] * 3) == 1
    assert period_of(["sliding_attention"] * 3) is None
    assert period_of(["full_attention", "sliding_attention"]) is None
