"""Models with windows, soft caps, biases and stretched positions in the runtimes of their exports.

What a runtime cannot be told of is refused (tests/formats/test_features.py); here is what is not.
"""

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from .test_llama_cpp_families import LLAMA3, SIZES, write_model

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 16}
WIDE = SIZES | {"hidden_size": 96, "num_hidden_layers": 6}  # its square root is no bf16 number
SCALE = {"query_pre_attn_scalar": 16}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama3 positions": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "linear positions": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "small heads": LlamaConfig(**SIZES | {"head_dim": 8}),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=512),
    "mistral, window": MistralConfig(**SIZES, sliding_window=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3, some windows": Qwen3Config(**SIZES, **SLIDING, max_window_layers=1),
    "gemma, exact gelu": GemmaConfig(**SIZES, hidden_act="gelu"),
    "gemma2": Gemma2Config(**SIZES, **SCALE, sliding_window=512),
    "gemma2, low soft caps": Gemma2Config(
        **WIDE, **SCALE, sliding_window=512, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2, window": Gemma2Config(**SIZES, **SCALE, sliding_window=16),
    "gemma3": Gemma3TextConfig(**WIDE, **SCALE, sliding_window=16),
    "gemma3, another scale": Gemma3TextConfig(**WIDE, query_pre_attn_scalar=64, sliding_window=16),
}
REFUSED = {
    "mlx": {"mistral, window", "qwen3, some windows", "gemma2, window"},
    "gguf": {
        "mistral, window",
        "qwen3, some windows",
        "gemma, exact gelu",
        "gemma3, another scale",
    },
    "onnx": {"linear positions", "yarn", "qwen2, yarn", "small heads"}
    | {name for name in MODELS if name.startswith("gemma")},
}
CASES = [(name, model) for name, refused in REFUSED.items() for model in MODELS.keys() - refused]


@pytest.mark.parametrize(("format", "model"), sorted(CASES))
def test_what_is_exported_runs_and_computes_the_same(format, model, qalora, tmp_path):
    source = write_model(MODELS[model], tmp_path)
    out = tmp_path / ("model.gguf" if format == "gguf" else "exported")
    qalora("export", source, "--format", format, "--out", out)
    print(qalora("verify", out, "--against", source))
