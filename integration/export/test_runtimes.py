"""Exported models in the runtimes that they are for, each without this project installed."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.random_adapter import PREFIX, random_adapter
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_kernels.groups import group_index
from qalora_plugin import QALoRAQuantConfig, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main as command_line
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.weights import ExactWeight
from qalora_plugin.quickstart.embedded import base_model_path

README = Path(__file__).resolve().parents[2] / "README.md"
RANK = 8
IDS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
TEXT = "KING HENRY:\nWhat's this? 1066 and all that,\n\n  my lord!"
PROMPT = "KING HENRY:\nWhat"
MESSAGES = [{"role": "user", "content": "Write a line of a play."}]


RunExport = Any  # the fixture's type, in conftest.py


class Model(NamedTuple):
    """The quickstart's base quantized, an adapter for it, and both merged."""

    base: Path
    adapter: Path
    merged: Path


def write_base(folder, config):
    """Write the quickstart's base, quantized."""
    base = folder / "base"
    load = AutoModelForCausalLM.from_pretrained
    load(base_model_path(), quantization_config=config).save_pretrained(base)
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(base)
    return base


def write_model(folder, config):
    """Write the three below `folder`."""
    base, adapter = write_base(folder, config), folder / "adapter"
    random_adapter(open_quantized(base), adapter, rank=RANK, alpha=RANK, size=0.05)
    merge_adapter(adapter, folder / "merged", base)
    return Model(base, adapter, folder / "merged")


@pytest.fixture(scope="module", params=[2, 3, 4, 8], ids="{}bit".format)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"int{request.param}")
    return write_model(folder, QALoRAQuantConfig(bits=request.param, group_size=32))


def load(directory):
    """Load a model in fp32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def logits(model, ids=IDS):
    """Return a model's logits."""
    return model(input_ids=ids).logits


def assert_equal(saved, expected):
    torch.testing.assert_close(saved["logits"], expected, atol=1e-4, rtol=0)


def test_mlx(model, run_export, tmp_path):
    export_model(model.merged, tmp_path / "mlx", "mlx")
    printed, saved = run_export("mlx", tmp_path / "mlx", IDS, PROMPT)
    ours = load(model.merged)
    assert_equal(saved, logits(ours))
    tokenizer = AutoTokenizer.from_pretrained(model.merged)
    ids = tokenizer(PROMPT, return_tensors="pt")
    tokens = ours.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    expected = tokenizer.decode(tokens[ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert printed["text"].strip() == expected.strip()


def test_torchao_in_stock_transformers(model, run_export, tmp_path):
    export_model(model.merged, tmp_path / "torchao", "torchao")
    printed, saved = run_export("torchao", tmp_path / "torchao", IDS)
    assert "IntxUnpackedToInt8Tensor" in printed["weights"]
    assert_equal(saved, logits(load(model.merged)))


def test_lora_in_stock_peft(model, run_export, tmp_path):
    """The adapter as LoRA on the untouched base, which stock transformers holds through torchao."""
    export_model(model.base, tmp_path / "base", "torchao")
    export_model(model.adapter, tmp_path / "lora", "lora")
    printed, saved = run_export("lora", tmp_path / "base", IDS, tmp_path / "lora")
    assert printed["change"] > 0.1

    expected, source = load(base_model_path()), open_quantized(model.base)
    adapter = load_file(model.adapter / "adapter_model.safetensors")
    for name, spec in source.layers.items():
        a, b = (adapter[f"{PREFIX}{name}.qalora_{part}.weight"].double() for part in "AB")
        index = group_index(None, spec.group_size, spec.in_features, a.device)
        weight = ExactWeight(source.layer(name)).values + (b @ a)[:, index]
        expected.get_submodule(name).weight.data = weight.float()
    assert_equal(saved, logits(expected))


def test_onnx(model, qalora, run_export, tmp_path):
    qalora("export", model.merged, "--format", "onnx", "--out", tmp_path / "onnx")
    _, saved = run_export("onnx", tmp_path / "onnx", IDS)
    ours = load(model.merged)
    assert_equal(saved, logits(ours))
    tokens = ours.generate(IDS[:1], max_new_tokens=16, do_sample=False)[0]
    expected, generated = tokens[IDS.shape[1] :].tolist(), saved["generated"].tolist()
    assert generated and generated == expected[: len(generated)]


# its own rounding of activations to 8 bits: measured here, up to 0.1 of a log-probability
LLAMA_CPP_ROUNDING = 0.2


def run_llama_cpp(model, text, qalora, run_export, folder):
    """Export a model to GGUF and run it.

    Returns:
        The text's tokens, its tokens and an answer as llama.cpp gives them, and log-probabilities.
    """
    out, asked = folder / "model.gguf", folder / "asked.json"
    qalora("export", model, "--format", "gguf", "--out", out)
    ids = AutoTokenizer.from_pretrained(model)(text).input_ids
    asked.write_text(json.dumps({"text": text, "messages": MESSAGES}))
    printed, saved = run_export("gguf", out, torch.tensor([ids]), asked)
    return ids, printed, saved["logprobs"][0]


def test_llama_cpp(model, qalora, run_export, tmp_path):
    ids, printed, found = run_llama_cpp(model.merged, TEXT, qalora, run_export, tmp_path)
    assert printed["tokens"] == ids
    expected = logits(load(model.merged), torch.tensor([ids]))[0, -1].log_softmax(-1)
    likely = expected > -8
    difference = (found - expected).abs()
    print(f"llama.cpp: {difference[likely].max():.3f} (likely), {difference.max():.3f} (all)")
    assert difference[likely].max() < LLAMA_CPP_ROUNDING
    assert printed["answer"].strip()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gguf_of_minima_is_bit_for_bit(bits, qalora, tmp_path):
    """As `qalora quickstart` quantizes: every weight that gguf-py dequantizes is the merged one."""
    merged = write_model(tmp_path, QALoRAQuantConfig(bits, 32, offsets_at="minimum")).merged
    out = tmp_path / "model.gguf"
    qalora("export", merged, "--format", "gguf", "--out", out)
    report = json.loads(qalora("verify", out, "--against", merged, "--json"))
    assert (report["layers"], report["largest_error"]) == (28, 0.0)
    assert report["runtime"]["not_run"] is None  # and what llama.cpp computes is within its bound


def write_sentencepiece_like(out):
    """A tokenizer of the kind of Llama 2 and Mistral: byte fallback, spaces as U+2581."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special + byte_tokens)
    tokenizer.train_from_iterator([README.read_text()], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    content["pre_tokenizer"] = None
    (out / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def test_llama_cpp_tokenizes_as_sentencepiece_models_do(qalora, run_export, tmp_path):
    base = write_base(tmp_path, QALoRAQuantConfig(bits=4, group_size=32))
    write_sentencepiece_like(base)
    text = "The quantized model's  weights: 4 bits,\n caf\u00e9 \u4f60 and an adapter."
    ids, printed, _ = run_llama_cpp(base, text, qalora, run_export, tmp_path)
    assert len(ids) < len(text)  # merges are used
    assert printed["tokens"] == ids


@pytest.mark.parametrize("engine", ["gptqmodel", "autogptq"])
def test_gptq_of_merged_scales(engine, run_export, tmp_path):
    base = tmp_path / "base"
    options = ["--bits", "4", "--group-size", "32", "--method", "rtn", "--zero-points", "integer"]
    assert command_line(["quantize", str(base_model_path()), "--out", str(base), *options]) == 0
    adapter = random_adapter(
        open_quantized(base), tmp_path / "adapter", "scales", rank=RANK, alpha=RANK, size=0.05
    )
    merge_adapter(adapter, tmp_path / "merged", base)
    export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    _, saved = run_export("gptq", tmp_path / "gptq", IDS, environment=engine)
    expected = logits(load(tmp_path / "merged"))
    assert (expected - logits(load(base))).abs().max() > 0.01
    assert_equal(saved, expected)


def test_the_environment_has_the_packages_alone(env_python, run_python):
    code = "import gguf, mlx_lm, onnxruntime_genai, peft, torchao, transformers, xllamacpp"
    code += "; import importlib.util; assert importlib.util.find_spec('qalora_plugin') is None"
    run_python(env_python("export"), "-P", "-c", code)  # -P: not from the current directory
    assert sys.executable != str(env_python("export"))
