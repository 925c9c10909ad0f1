"""What a merged directory has beside its weights, read back with transformers."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.side_files import chat_templates
from qalora_plugin.errors import CheckpointError
from qalora_plugin.quickstart.embedded import base_model_path

TALK = [{"role": "user", "content": "hello"}]
BASES, TRAINED, TOOLS = (
    "base:{{ messages[0].content }}",
    "trained:{{ messages[0].content }}",
    "tools",
)


def tokenizer(directory, template=None, where=None, **special):
    """Write the quickstart's tokenizer with other special tokens, and a template in `where`."""
    found = AutoTokenizer.from_pretrained(base_model_path(), **special)
    found.chat_template = template
    found.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    if where == "tokenizer_config.json" and template is not None:
        (directory / "chat_template.jinja").unlink()
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return directory


@pytest.fixture
def base(base_dir, tmp_path):
    """A quantized base with a tokenizer, its template in a file, and a generation config."""
    target = tmp_path / "base"
    shutil.copytree(base_dir, target)
    shutil.rmtree(target / "additional_chat_templates")
    tokenizer(target, BASES)
    GenerationConfig(eos_token_id=5, max_new_tokens=7).save_pretrained(target)
    return target


@pytest.fixture
def merged(base, make_adapter, tmp_path):
    """`merged(write)`: a merge of an adapter directory that `write` has added files to."""

    def merge(write):
        adapter = make_adapter(base)
        write(adapter)
        return merge_adapter(adapter, tmp_path / "merged").out

    return merge


def prompt(directory):
    """Return the text that transformers makes of a talk."""
    return AutoTokenizer.from_pretrained(directory).apply_chat_template(TALK, tokenize=False)


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("bases", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_templates_that_was_trained_with_wins(bases, where, base, merged):
    tokenizer(base, BASES, bases)
    assert prompt(merged(lambda adapter: tokenizer(adapter, TRAINED, where))) == "trained:hello"


def test_a_tokenizer_without_a_template_gets_none_of_the_bases(merged):
    out = merged(tokenizer)
    assert AutoTokenizer.from_pretrained(out).chat_template is None and chat_templates(out) == {}


def test_a_template_alone_beside_the_adapter(merged):
    out = merged(lambda adapter: (adapter / "chat_template.jinja").write_text(TRAINED))
    assert prompt(out) == "trained:hello"
    assert len(AutoTokenizer.from_pretrained(out)) == 2048


def test_an_adapter_without_a_tokenizer_takes_all_of_the_bases(base, merged):
    out = merged(lambda adapter: None)
    assert prompt(out) == "base:hello"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_several_templates(merged):
    out = merged(lambda adapter: tokenizer(adapter, {"default": TRAINED, "tool_use": TOOLS}))
    assert AutoTokenizer.from_pretrained(out).chat_template == chat_templates(out)
    assert chat_templates(out) == {"default": TRAINED, "tool_use": TOOLS}


def test_a_new_end_of_text_halts_the_merged_model(merged):
    out = merged(lambda adapter: tokenizer(adapter, eos_token="a"))
    end = AutoTokenizer.from_pretrained(base_model_path()).convert_tokens_to_ids("a")
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [end, 5] and generation.max_new_tokens == 7
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == end


def test_a_new_end_of_text_and_no_generation_config(base, merged):
    (base / "generation_config.json").unlink()
    out = merged(lambda adapter: tokenizer(adapter, eos_token="a"))
    end = AutoTokenizer.from_pretrained(out).eos_token_id
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == end
    assert not (out / "generation_config.json").exists()


def test_an_end_that_the_base_knows_already(base, merged):
    GenerationConfig(eos_token_id=[9, 1]).save_pretrained(base)
    out = merged(tokenizer)  # whose <|eos|> is 1
    assert GenerationConfig.from_pretrained(out).eos_token_id == [9, 1]


def test_the_generation_config_that_was_saved_with_the_adapter(merged):
    def write(adapter):
        tokenizer(adapter)
        GenerationConfig(eos_token_id=33, do_sample=True, top_k=3).save_pretrained(adapter)

    generation = GenerationConfig.from_pretrained(merged(write))
    assert (generation.eos_token_id, generation.top_k) == (33, 3)


def test_tokens_that_were_removed_in_training_do_not_come_back(base, merged):
    (base / "added_tokens.json").write_text('{"<old>": 63}')
    (base / "vocab.json").write_text("{}")
    out = merged(tokenizer)
    assert not (out / "added_tokens.json").exists() and not (out / "vocab.json").exists()


def test_a_processor_that_was_trained_with(base, merged):
    (base / "preprocessor_config.json").write_text('{"size": 1}')
    out = merged(lambda adapter: (adapter / "preprocessor_config.json").write_text('{"size": 2}'))
    assert json.loads((out / "preprocessor_config.json").read_text()) == {"size": 2}


def test_an_adapter_beside_the_base_does_not_come_along(base, make_adapter, merged):
    """transformers would load that adapter, and the base that it names, instead of the model."""
    other = make_adapter(base, name="other")
    shutil.copytree(other, base, dirs_exist_ok=True)
    out = merged(lambda adapter: None)
    assert (base / "adapter_config.json").exists() and not (out / "adapter_config.json").exists()


TEMPLATES = {
    "a link out": ("chat_template.jinja", None, "leads out of its directory"),
    "other bytes": ("chat_template.jinja", b"\xff", "expected text in UTF-8"),
    "no name": (
        "tokenizer_config.json",
        b'{"chat_template": [{}]}',
        "chat_template.0.name: missing",
    ),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_are_none(case, tmp_path):
    name, content, message = TEMPLATES[case]
    (tmp_path / "secret").write_text("secret")
    path = tmp_path / "model" / name
    path.parent.mkdir()
    path.symlink_to(tmp_path / "secret") if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        chat_templates(path.parent)


@pytest.mark.parametrize("content", ["[]", '{"model": 3}', '{"model": {"vocab": [1]}}'])
def test_a_damaged_vocabulary_is_an_error(content, make_adapter, base, tmp_path):
    adapter = tokenizer(make_adapter(base), eos_token="a")
    (adapter / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
