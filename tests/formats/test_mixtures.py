"""Mixtures of experts in GGUF and MLX: every expert's weights in its place."""

import json

import pytest
from support.mixtures import mixture
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.errors import CheckpointError
from qalora_plugin.formats.export import export_model
from qalora_plugin.verify.export import verify_export

from .weights import with_tokenizer

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """`quantized(name, ...)`: the directory of a mixture, quantized; keywords are the config's."""

    def make(name, inner=64, **grid):
        folder = tmp_path_factory.mktemp(name)
        mixture(name, inner=inner, vocab_size=2048).save_pretrained(folder / "16")
        config = QALoRAQuantConfig(**{"bits": 4, "group_size": 32} | grid)
        model = AutoModelForCausalLM.from_pretrained(folder / "16", quantization_config=config)
        model.save_pretrained(folder / "int")
        return with_tokenizer(folder / "int", folder / "model")

    return make


@pytest.mark.parametrize("inner", [64, 44], ids=["all integers", "down is dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gguf(name, inner, quantized, tmp_path):
    source = quantized(name, inner, bits=3)
    result = export_model(source, tmp_path / "m.gguf", "gguf")
    assert len(result.dense) == (16 if inner == 44 else 0)
    report = verify_export(tmp_path / "m.gguf", source)
    assert report.layers == result.layers + len(result.dense) and report.unchecked == 0


@pytest.mark.parametrize("inner", [64, 44], ids=["all integers", "down is dense"])
@pytest.mark.parametrize("name", FAMILIES)
def test_mlx(name, inner, quantized, tmp_path):
    pytest.importorskip("mlx.core", reason="needs MLX: pip install '.[export]'")
    source = quantized(name, inner)
    result = export_model(source, tmp_path / "mlx", "mlx")
    assert len(result.dense) == (16 if inner == 44 else 0)
    assert verify_export(tmp_path / "mlx", source).layers == result.layers + len(result.dense)
    grids = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    dense = [key for key, grid in grids.items() if grid is False]
    assert len(dense) == (2 if inner == 44 else 0)
    assert all(key.endswith(".switch_mlp.down_proj") for key in dense)


@pytest.mark.parametrize("format", ["gguf", "mlx"])
def test_what_one_tensor_cannot_hold_is_refused(format, quantized, tmp_path):
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    other = {"experts.5.up_proj": {"bits": 2}}
    with pytest.raises(CheckpointError, match=r"experts differ in bits.*\(2, 32\), \(4, 32\)"):
        export_model(quantized("qwen3_moe", dynamic=other), out, format)
    kept = ["model.layers.0.mlp.experts.5.up_proj"]
    with pytest.raises(CheckpointError, match=r"7 of 8 experts are quantized|no place for"):
        export_model(quantized("qwen3_moe", modules_to_not_convert=kept), out, format)
    message = r"down_proj of its experts is in 16 bits" if format == "mlx" else "quantize them"
    with pytest.raises(CheckpointError, match=message):
        kept = ["down_proj"] if format == "mlx" else ["experts"]
        export_model(quantized("qwen3_moe", modules_to_not_convert=kept), out, format)
    with pytest.raises(CheckpointError, match="model_type 'deepseek_v3' cannot be written"):
        export_model(quantized("deepseek_v3"), out, format)
    assert not out.exists()
