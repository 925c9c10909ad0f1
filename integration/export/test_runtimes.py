"""Exported models in the runtimes that they are for, each without this project installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.random_adapter import PREFIX, random_adapter
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_kernels.groups import group_index
from qalora_plugin import QALoRAQuantConfig, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.format import format_named
from qalora_plugin.cli import main as qalora
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.weights import ExactWeight
from qalora_plugin.quickstart.embedded import base_model_path

HERE = Path(__file__).resolve().parent
RANK = 8
TEXT = "KING HENRY:\nWhat's this? 1066 and all that,\n\n  my lord!"
PROMPT = "KING HENRY:\nWhat"
MESSAGES = [{"role": "user", "content": "Write a line of a play."}]


class Model(NamedTuple):
    """The quickstart's base quantized, an adapter for it, and both merged."""

    base: Path
    adapter: Path
    merged: Path


def write_model(folder: Path, config: QALoRAQuantConfig) -> Model:
    """The three below `folder`."""
    AutoModelForCausalLM.from_pretrained(
        base_model_path(), quantization_config=config
    ).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(folder / "base")
    base = open_quantized(folder / "base")
    adapter = random_adapter(base, folder / "adapter", rank=RANK, alpha=RANK, size=0.05)
    merge_adapter(adapter, folder / "merged", folder / "base")
    return Model(folder / "base", adapter, folder / "merged")


@pytest.fixture(scope="module", params=[2, 3, 4, 8], ids="{}bit".format)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(f"int{request.param}")
    return write_model(folder, QALoRAQuantConfig(bits=request.param, group_size=32))


@pytest.fixture
def input_ids(tmp_path: Path) -> Path:
    """A file with two rows of token ids."""
    ids = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, tmp_path / "input.safetensors")
    return tmp_path / "input.safetensors"


def our_logits(directory: Path, input_ids: Path) -> torch.Tensor:
    """Logits of a model in our format, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=load_file(input_ids)["input_ids"]).logits


def assert_equal(out: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(load_file(out)["logits"], expected, atol=1e-4, rtol=0)


def test_mlx(
    model: Model,
    input_ids: Path,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    tmp_path: Path,
) -> None:
    export_model(model.merged, tmp_path / "mlx", "mlx")
    arguments = [tmp_path / "mlx", input_ids, tmp_path / "out", PROMPT]
    result = run_json(env_python("export"), format_named("mlx").script, *arguments)
    assert_equal(tmp_path / "out", our_logits(model.merged, input_ids))
    ours = AutoModelForCausalLM.from_pretrained(model.merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model.merged)
    ids = tokenizer(PROMPT, return_tensors="pt")
    tokens = ours.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    expected = tokenizer.decode(tokens[ids.input_ids.shape[1] :], skip_special_tokens=True)
    assert result["text"].strip() == expected.strip()


def test_torchao_in_stock_transformers(
    model: Model,
    input_ids: Path,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    tmp_path: Path,
) -> None:
    export_model(model.merged, tmp_path / "torchao", "torchao")
    arguments = [tmp_path / "torchao", input_ids, tmp_path / "out"]
    result = run_json(env_python("export"), format_named("torchao").script, *arguments)
    assert "IntxUnpackedToInt8Tensor" in result["weights"]
    assert_equal(tmp_path / "out", our_logits(model.merged, input_ids))


def test_lora_in_stock_peft(
    model: Model,
    input_ids: Path,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The adapter as LoRA on the untouched base, which stock transformers holds through torchao."""
    export_model(model.base, tmp_path / "base", "torchao")
    export_model(model.adapter, tmp_path / "lora", "lora")
    arguments = [tmp_path / "base", input_ids, tmp_path / "out", tmp_path / "lora"]
    result = run_json(env_python("export"), format_named("lora").script, *arguments)
    assert result["change"] > 0.1

    expected = AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32)
    source, adapter = (
        open_quantized(model.base),
        load_file(model.adapter / "adapter_model.safetensors"),
    )
    for name, spec in source.layers.items():
        a, b = (adapter[f"{PREFIX}{name}.qalora_{part}.weight"].double() for part in "AB")
        index = group_index(None, spec.group_size, spec.in_features, a.device)
        weight = ExactWeight(source.layer(name)).values + (b @ a)[:, index]
        expected.get_submodule(name).weight.data = weight.float()
    with torch.no_grad():
        logits = expected(input_ids=load_file(input_ids)["input_ids"]).logits
    assert_equal(tmp_path / "out", logits)


def export_in_environment(
    python: Path, project_path: Path, source: Path, format: str, out: Path
) -> None:
    """Export with the libraries of another environment."""
    command = ["-P", "-m", "qalora_plugin", "export", source, "--format", format, "--out", out]
    environment = {**os.environ, "PYTHONPATH": str(project_path)}
    subprocess.run([python, *command], check=True, env=environment)


def test_onnx(
    model: Model,
    input_ids: Path,
    env_python: Callable[[str], Path],
    project_path: Path,
    tmp_path: Path,
) -> None:
    python = env_python("export")
    export_in_environment(python, project_path, model.merged, "onnx", tmp_path / "onnx")
    arguments = [tmp_path / "onnx", input_ids, tmp_path / "out"]
    subprocess.run([python, format_named("onnx").script, *arguments], check=True)
    assert_equal(tmp_path / "out", our_logits(model.merged, input_ids))
    ours = AutoModelForCausalLM.from_pretrained(model.merged, dtype=torch.float32)
    ids = load_file(input_ids)["input_ids"][:1]
    expected = ours.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    generated = load_file(tmp_path / "out")["generated"].tolist()
    assert generated and generated == expected[: len(generated)]


# its own rounding of activations to 8 bits: measured here, up to 0.1 of a log-probability
LLAMA_CPP_ROUNDING = 0.2


def run_llama_cpp(
    python: Path, run_json: Callable[..., Any], model: Path, ids: list[int], text: str, folder: Path
) -> Any:
    """Log-probabilities after `ids` in `folder`/out; tokens of the text and an answer."""
    save_file({"input_ids": torch.tensor([ids])}, folder / "ids")
    (folder / "asked.json").write_text(json.dumps({"text": text, "messages": MESSAGES}))
    script = format_named("gguf").script
    return run_json(python, script, model, folder / "ids", folder / "out", folder / "asked.json")


def test_llama_cpp(
    model: Model,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    project_path: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model.gguf"
    export_in_environment(env_python("export"), project_path, model.merged, "gguf", out)
    tokenizer = AutoTokenizer.from_pretrained(model.merged)
    ids = tokenizer(TEXT).input_ids
    ours = AutoModelForCausalLM.from_pretrained(model.merged, dtype=torch.float32)
    with torch.no_grad():
        expected = ours(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    result = run_llama_cpp(env_python("export"), run_json, out, ids, TEXT, tmp_path)
    assert result["tokens"] == ids
    found = load_file(tmp_path / "out")["logprobs"][0]
    likely = expected > -8
    difference = (found - expected).abs()
    print(f"llama.cpp: {difference[likely].max():.3f} (likely), {difference.max():.3f} (all)")
    assert difference[likely].max() < LLAMA_CPP_ROUNDING
    assert result["answer"].strip()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gguf_of_minima_is_bit_for_bit(
    bits: int, env_python: Callable[[str], Path], project_path: Path, tmp_path: Path
) -> None:
    """As `qalora quickstart` quantizes: every weight that gguf-py dequantizes is the merged one."""
    merged = write_model(tmp_path, QALoRAQuantConfig(bits, 32, offsets_at="minimum")).merged
    python, out = env_python("export"), tmp_path / "model.gguf"
    export_in_environment(python, project_path, merged, "gguf", out)
    environment = {**os.environ, "PYTHONPATH": str(project_path)}
    command = ["-P", "-m", "qalora_plugin", "verify", out, "--against", merged, "--json"]
    done = subprocess.run([python, *command], check=True, env=environment, stdout=subprocess.PIPE)
    report = json.loads(done.stdout)
    assert (report["layers"], report["largest_error"]) == (28, 0.0)
    assert report["runtime"]["not_run"] is None  # and what llama.cpp computes is within its bound


def write_sentencepiece_like(out: Path) -> None:
    """A tokenizer of the kind of Llama 2 and Mistral: byte fallback, spaces as U+2581."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special + byte_tokens)
    tokenizer.train_from_iterator([HERE.parents[1].joinpath("README.md").read_text()], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(special)]
    content["pre_tokenizer"] = None
    (out / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


def test_llama_cpp_tokenizes_as_sentencepiece_models_do(
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    project_path: Path,
    tmp_path: Path,
) -> None:
    config = QALoRAQuantConfig(bits=4, group_size=32)
    AutoModelForCausalLM.from_pretrained(
        base_model_path(), quantization_config=config
    ).save_pretrained(tmp_path / "base")
    write_sentencepiece_like(tmp_path / "base")
    out = tmp_path / "model.gguf"
    export_in_environment(env_python("export"), project_path, tmp_path / "base", "gguf", out)
    text = "The quantized model's  weights: 4 bits,\n caf\u00e9 \u4f60 and an adapter."
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")(text).input_ids
    assert len(ids) < len(text)  # merges are used
    result = run_llama_cpp(env_python("export"), run_json, out, ids, text, tmp_path)
    assert result["tokens"] == ids


@pytest.mark.parametrize("engine", ["gptqmodel", "autogptq"])
def test_gptq_of_merged_scales(
    engine: str,
    input_ids: Path,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base = tmp_path / "base"
    options = ["--bits", "4", "--group-size", "32", "--method", "rtn", "--zero-points", "integer"]
    assert qalora(["quantize", str(base_model_path()), "--out", str(base), *options]) == 0
    adapter = random_adapter(
        open_quantized(base), tmp_path / "adapter", "scales", rank=RANK, alpha=RANK, size=0.05
    )
    merge_adapter(adapter, tmp_path / "merged", base)
    export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    arguments = [tmp_path / "gptq", input_ids, tmp_path / "out"]
    run_json(env_python(engine), format_named("gptq").script, *arguments)
    expected = our_logits(tmp_path / "merged", input_ids)
    assert (expected - our_logits(base, input_ids)).abs().max() > 0.01
    assert_equal(tmp_path / "out", expected)


def test_the_environment_has_the_packages_alone(
    env_python: Callable[[str], Path],
) -> None:
    code = "import gguf, mlx_lm, onnxruntime_genai, peft, torchao, transformers, xllamacpp"
    code += "; import importlib.util; assert importlib.util.find_spec('qalora_plugin') is None"
    # -P: not from the current directory
    assert subprocess.run([env_python("export"), "-P", "-c", code]).returncode == 0
    assert sys.executable != str(env_python("export"))
