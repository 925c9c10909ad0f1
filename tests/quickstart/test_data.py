"""The embedded base model and the pairs cut from the standard library."""

import ast
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_plugin.errors import QALoRAError
from qalora_plugin.quantize import stdlib_text
from qalora_plugin.quantize.stdlib_text import load_docstrings, load_pairs
from qalora_plugin.quickstart import embedded
from qalora_plugin.quickstart.embedded import base_model_path

ROOT = Path(__file__).parents[2]
Pairs = list[dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def train_pairs():
    return load_pairs("train")


@pytest.fixture(scope="module")
def eval_pairs():
    return load_pairs("eval")


@pytest.fixture
def small_stdlib(tmp_path):
    """A directory laid out as a standard library: one held-out module, one not, one excluded."""
    functions = "\n".join(
        f'def f{i}(a, b=2):\n    """Return number {i}.\n\n    More.\n    """\n    return a + {i}\n'
        for i in range(60)
    )
    (tmp_path / "calendar.py").write_text(functions)
    (tmp_path / "string.py").write_text(functions.replace("def f", "def g"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_calendar.py").write_text(functions)
    return tmp_path


def test_there_are_enough_pairs_and_they_fit_the_context(train_pairs, eval_pairs, tokenizer):
    # 500 even where tkinter is packaged apart.
    assert len(train_pairs) >= 500
    assert len(eval_pairs) >= 60
    for pair in train_pairs + eval_pairs:
        assert set(pair) == {"prompt", "completion"}
        assert len(tokenizer(pair["prompt"] + pair["completion"])["input_ids"]) < 512
        ast.parse(pair["completion"])


def test_splits_do_not_overlap(train_pairs, eval_pairs):
    for key in ("prompt", "completion"):
        values = [pair[key] for pair in train_pairs + eval_pairs]
        assert len(set(values)) == len(values)


def test_calibration_texts_are_the_training_split(small_stdlib):
    texts = stdlib_text.calibration_texts(small_stdlib)
    train = load_pairs("train", stdlib=small_stdlib)
    assert texts == [pair["prompt"] + pair["completion"] for pair in train]
    for pair in load_pairs("eval", stdlib=small_stdlib):
        assert pair["prompt"] + pair["completion"] not in texts


def test_held_out_modules_are_not_pretrained_on():
    pretraining = stdlib_text.source_files(held_out=False)
    held_out = stdlib_text.source_files(held_out=True)
    assert {"calendar.py", "logging", "mailbox.py"} <= {
        path.name if path.name != "__init__.py" else path.parent.name for path in held_out
    }
    assert not set(pretraining) & set(held_out)
    # Names checked apart from the module's own filter.
    for path in pretraining:
        for part in path.with_suffix("").parts[-3:]:
            assert part not in {"calendar", "ftplib", "imaplib", "ipaddress", "mailbox", "tkinter"}
            assert part not in {"test", "tests", "site-packages", "lib2to3", "idlelib"}


def test_pair_of_a_known_function(small_stdlib):
    pairs = load_pairs("train", stdlib=small_stdlib) + load_pairs("eval", stdlib=small_stdlib)
    assert len(pairs) == 60  # those of calendar.py alone
    assert {
        "prompt": "### Task\nReturn number 7.\nName: f7\nArguments: a, b=2\n### Answer\n",
        "completion": "def f7(a, b=2):\n    return a + 7\n",
    } in pairs


def test_split_does_not_depend_on_the_other_functions(small_stdlib):
    before = load_pairs("eval", stdlib=small_stdlib)
    source = small_stdlib / "calendar.py"
    functions = source.read_text().split("\n\ndef ")
    source.write_text("\n\n".join(reversed([functions[0], *("def " + f for f in functions[1:])])))
    after = load_pairs("eval", stdlib=small_stdlib)
    assert before and after != before
    assert sorted(map(str, after)) == sorted(map(str, before))


def test_long_functions_are_left_out(small_stdlib):
    every = load_pairs("train", stdlib=small_stdlib)
    shortest = min(max(map(len, pair.values())) for pair in every)
    pairs = load_pairs("train", max_chars=shortest, stdlib=small_stdlib)
    assert 0 < len(pairs) < len(every)
    assert all(max(map(len, pair.values())) == shortest for pair in pairs)


def test_missing_source_is_one_clear_error(tmp_path):
    with pytest.raises(QALoRAError, match=r"expected the Python sources.*--dataset"):
        load_pairs(stdlib=tmp_path)
    (tmp_path / "calendar.py").write_text("x = 1\n")
    with pytest.raises(QALoRAError, match="expected functions with docstrings"):
        load_pairs(stdlib=tmp_path)


def test_unknown_split_is_refused():
    with pytest.raises(QALoRAError, match="found 'test'"):
        load_pairs("test")


def test_incomplete_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "embedded.py"))
    with pytest.raises(QALoRAError, match=r"lacks config\.json, model\.safetensors"):
        base_model_path()


def test_base_model_size(model):
    assert sum(p.numel() for p in model.parameters()) == 3_672_320
    files = [path for path in base_model_path().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8.0e6


def test_tokenizer_round_trips(tokenizer):
    text = "def f(x):\n\tif x > 1:\n        return 'ü€😀'  # déjà vu\n\n\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert len(tokenizer) == 2048
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(special)) == 3 and None not in special


def test_chat_template_writes_the_pairs_format(tokenizer, train_pairs):
    pair = train_pairs[0]
    instruction = pair["prompt"].removeprefix("### Task\n").removesuffix("\n### Answer\n")
    messages = [{"role": "user", "content": instruction}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == pair["prompt"]
    messages.append({"role": "assistant", "content": pair["completion"]})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == pair["prompt"] + pair["completion"] + tokenizer.eos_token


def test_base_model_has_learned_python(model, tokenizer):
    text = next(
        p for p in stdlib_text.source_files(held_out=True) if p.name == "mailbox.py"
    ).read_text()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:2048]).view(4, 512)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.6 * math.log(2048)


@pytest.fixture(scope="module")
def train_base():
    path = ROOT / "recipes" / "quickstart" / "train_base.py"
    spec = importlib.util.spec_from_file_location("train_base", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_script_writes_a_model_that_loads(
    train_base, small_stdlib, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(stdlib_text, "_root", lambda stdlib: small_stdlib)
    out = tmp_path / "out"
    options = ["--out", str(out), "--steps", "2", "--batch-size", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["train_base.py", *options])
    train_base.main()
    assert "held-out loss:" in capsys.readouterr().out
    assert "| steps | 2 |" in (out / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(out).eos_token_id == model.config.eos_token_id


def test_docstrings_are_one_line_and_no_function_is_in_both_splits():
    training, held_out = load_docstrings("train"), load_docstrings("eval")
    assert len(training) > 500 and len(held_out) > 60
    for key in ("prompt", "completion"):
        assert {row[key] for row in training}.isdisjoint(row[key] for row in held_out)
    for row in training + held_out:
        function = ast.parse(row["prompt"]).body[0]
        assert ast.get_docstring(function) is None and len(row["prompt"]) <= 200
        assert row["completion"].endswith(".") and "\n" not in row["completion"]
