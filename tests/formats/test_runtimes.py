"""Exports run in their runtimes: the same logits pass, others and crashes do not."""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.adapters import edit_json, edit_tensors, rewrite
from support.random_adapter import random_adapter
from transformers import AutoModelForCausalLM, LlamaConfig

from qalora_plugin.checkpoint.format import format_named
from qalora_plugin.cli import main
from qalora_plugin.errors import VerificationError
from qalora_plugin.formats.export import export_model
from qalora_plugin.formats.gguf.weights import q8_1, rounded
from qalora_plugin.verify.runtime import check_runtime

from .weights import BLOCKS_OF_32, STOCK

NAMES = ("mlx", "torchao", "onnx", "gguf", "lora")


@pytest.fixture(scope="module")
def sources(family):
    """Two models of the same shapes; one projection has 8 bits and groups of 16."""
    configs = (LlamaConfig(**BLOCKS_OF_32), LlamaConfig(**BLOCKS_OF_32, initializer_range=0.03))
    return [family(config, mixed=(8, 16)) for config in configs]


def require(format):
    """Skip where the runtime is not installed."""
    runtime = format_named(format).runtime
    for names in runtime.modules:
        if not any(map(find_spec, names)):
            pytest.skip(f"needs {runtime.title}: pip install {runtime.install}")


@pytest.mark.parametrize("format", NAMES)
def test_runtime_computes_what_we_compute_and_nothing_else(format, sources, tmp_path):
    require(format)
    models = [source.directory for source in sources]
    if format == "lora":
        # each for the first model, but with other numbers
        models = [random_adapter(sources[0], tmp_path / f"adapter-{i}") for i in range(2)]
        path = models[1] / "adapter_model.safetensors"
        rewrite({key: value + 0.01 for key, value in load_file(path).items()}, path)
    out = tmp_path / ("model.gguf" if format == "gguf" else "model")
    export_model(models[0], out, format)
    report = check_runtime(out, models[0], format_named(format))
    assert report.runtime == format_named(format).runtime.title and report.not_run is None
    assert report.difference is not None and report.allowed is not None
    assert 0 < report.difference <= report.allowed < (0.05 if format == "gguf" else 2e-4)
    with pytest.raises(VerificationError, match="computes something else"):
        check_runtime(out, models[1], format_named(format))


@pytest.mark.parametrize(("prints", "message"), [("", "found '.n'"), ("hello", "found 'hello")])
def test_what_is_no_interpreter(prints, message, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho {prints}\n")
    program.chmod(0o755)
    with pytest.raises(VerificationError, match=f"is no Python interpreter: .*{message}"):
        check_runtime(tmp_path, tmp_path, format_named("torchao"), program)


def test_a_crash_that_prints_bytes(family, tmp_path):
    source, program = family(LlamaConfig(**BLOCKS_OF_32)).directory, tmp_path / "python"
    program.write_text(
        "#!/bin/sh\n[ $1 = -c ] && echo '[]' && exit\nprintf 'oh\\377' >&2\nexit 3\n"
    )
    program.chmod(0o755)
    with pytest.raises(VerificationError, match=r"exit status 3\):\noh\ufffd"):
        check_runtime(tmp_path, source, format_named("gguf"), program)


def test_a_classifier_is_not_run(family, tmp_path):
    """Its export is verified; the programs that run one compute logits of causal models."""
    source = family(LlamaConfig(**BLOCKS_OF_32)).directory
    model = shutil.copytree(source, tmp_path / "model")
    edit_json(model / "config.json", architectures=["LlamaForSequenceClassification"])
    (model / "qalora_manifest.json").unlink(missing_ok=True)
    report = check_runtime(tmp_path, model, format_named("torchao"), having_all(tmp_path))
    assert "only causal language models" in str(report.not_run)


def test_an_adapter_with_new_tokens_is_not_run(family, tmp_path):
    source = family(LlamaConfig(**BLOCKS_OF_32))
    adapter = random_adapter(source, tmp_path / "adapter")
    names = ("model.embed_tokens.weight", "lm_head.weight")
    rows = {f"base_model.model.{name}": source.reader.get(name) for name in names}
    larger = {key: torch.cat([value, value[:2]]) for key, value in rows.items()}
    edit_tensors(adapter, lambda tensors: tensors.update(larger))
    report = check_runtime(tmp_path, adapter, format_named("lora"), having_all(tmp_path))
    assert "has to be resized" in str(report.not_run)


def having_all(folder):
    """Write an interpreter that says that it has every runtime, and would not run one."""
    program = folder / "python"
    program.write_text("#!/bin/sh\necho '[]'\n")
    program.chmod(0o755)
    return program


def test_llama_cpp_computes_in_fp32_where_nothing_is_rounded(sources, tmp_path):
    require("gguf")
    export_model(sources[0].directory, tmp_path / "model.gguf", "gguf", exact=True)
    report = check_runtime(tmp_path / "model.gguf", sources[0].directory, format_named("gguf"))
    assert report.difference is not None and report.difference < 1e-5
    assert report.allowed == 1e-4


def test_command_runs_it_and_a_crash_is_an_error(sources, tmp_path, capsys):
    require("torchao")
    source, out = str(sources[0].directory), tmp_path / "model"
    export_model(source, out, "torchao")
    command = ["verify", str(out), "--against", source]
    assert main([*command, "--json"]) == 0
    runtime = json.loads(capsys.readouterr().out)["runtime"]
    assert runtime["not_run"] is None and runtime["difference"] <= runtime["allowed"]
    weights = out / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "qalora_config"}
    rewrite(load_file(weights), weights, metadata)  # no longer bound to config.json
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    assert main([*command, "--no-run"]) == 0
    assert main(command) == 1
    assert "stock transformers cannot run it (exit status 1)" in capsys.readouterr().err


def test_a_runtime_that_is_not_installed_is_named(tmp_path, capsys):
    if find_spec("gptqmodel") or find_spec("auto_gptq"):
        pytest.skip("this environment has an engine for GPTQ")
    export_model(STOCK, tmp_path / "gptq", "gptq")
    command = ["verify", str(tmp_path / "gptq"), "--against", str(STOCK)]
    assert main([*command, "--python", sys.executable]) == 0
    out = capsys.readouterr().out
    assert "layers are equal" in out
    assert (
        "not run: GPTQModel or AutoGPTQ is not installed (no module gptqmodel or auto_gptq)" in out
    )
    assert main([*command, "--python", str(tmp_path / "none")]) == 1
    assert "cannot be run" in capsys.readouterr().err


def test_rounding_of_activations_is_ggmls(sources, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install '.[export]'")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[0, :32] = 0
    kind = gguf.GGMLQuantizationType.Q8_0  # the same numbers as Q8_1, which adds their sum
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    torch.testing.assert_close(q8_1(x), torch.from_numpy(theirs), atol=0, rtol=1e-3)

    source = sources[0]
    export_model(source.directory, tmp_path / "model.gguf", "gguf")
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)
    seen = {}
    name = "model.layers.0.mlp.down_proj"
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        with rounded(model, tmp_path / "model.gguf", source):
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, args, output: seen.update(x=args[0])
            )
            after = model(ids).logits
        hook.remove()
        assert torch.equal(model(ids).logits, before)
    assert not torch.equal(after, before)
    torch.testing.assert_close(q8_1(seen["x"]), seen["x"], atol=0, rtol=1e-3)
