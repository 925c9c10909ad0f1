"""What comes with a checkpoint is neither run nor sent to the terminal as it is."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.directories import base_dir, dense_dir  # noqa: F401

from qalora_plugin.architecture.model import read_hf_config
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, ConfigError, OutputError, printable
from qalora_plugin.formats.export import export_model
from qalora_plugin.hf.load import load_model

ESCAPE = "\x1b[2J\x1b]0;title\x07"
CODE = "import pathlib; pathlib.Path({marker!r}).touch()\nclass C: pass\n"


@pytest.mark.parametrize("error", [CheckpointError, ConfigError, OutputError])
@pytest.mark.parametrize("text", [ESCAPE, "\x9b31m", "\r hidden", "\x00", "a\u202eb", "\u2066x"])
def test_control_characters_in_errors_are_shown_not_sent(error, text):
    shown = str(error(f"model.safetensors: {text}"))
    assert shown.startswith("model.safetensors: ") and text not in shown
    assert all(character.isprintable() for character in shown)
    assert printable("two lines\n\tof text, é, 字") == "two lines\n\tof text, é, 字"


def test_inspect_and_its_errors_show_no_escapes(base_dir, tmp_path, capsys):  # noqa: F811
    directory = shutil.copytree(base_dir, tmp_path / "model")
    path = directory / "config.json"
    settings = json.loads(path.read_text())
    settings["architectures"] = [f"Llama{ESCAPE}"]
    settings["quantization_config"]["base"] = {"name_or_path": ESCAPE}
    path.write_text(json.dumps(settings))
    state = load_file(directory / "model.safetensors")
    state[f"model.{ESCAPE}.scales"] = state.pop("model.norm.weight")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    for options in ([], ["--quick"]):
        main(["inspect", str(directory), *options])
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err


@pytest.fixture
def with_code(base_dir, tmp_path):  # noqa: F811
    """A quantized directory that brings Python code, and the file that its code would make."""
    directory, marker = shutil.copytree(base_dir, tmp_path / "model"), tmp_path / "was run"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (directory / f"{name}.py").write_text(CODE.format(marker=str(marker)))
    path = directory / "config.json"
    settings = json.loads(path.read_text()) | {"model_type": "own", "architectures": ["OwnModel"]}
    settings["auto_map"] = {
        "AutoConfig": "configuration_own.C",
        "AutoModelForCausalLM": "modeling_own.C",
    }
    path.write_text(json.dumps(settings))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_own.C", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return directory, marker


@pytest.mark.parametrize("format", ["gguf", "mlx", "torchao", "gptq"])
def test_exports_run_no_code_of_the_model(format, with_code, tmp_path, monkeypatch):
    directory, marker = with_code
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked to run code"))
    try:
        export_model(directory, tmp_path / ("m.gguf" if format == "gguf" else "out"), format)
    except CheckpointError as error:
        assert "own" in str(error) or "zero-point" in str(error)
    assert not marker.exists()


def test_loading_to_verify_runs_no_code_of_the_model(with_code, monkeypatch):
    directory, marker = with_code
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked to run code"))
    with pytest.raises(CheckpointError, match="without running code"):
        read_hf_config(directory)
    with pytest.raises(CheckpointError):
        load_model(open_quantized(directory))
    assert not marker.exists()
