"""Pushing to a stand-in for the Hub: the real huggingface_hub client against a local server."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.random_adapter import random_adapter

from qalora_plugin import export_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, OutputError
from qalora_plugin.files.hub import public_name
from qalora_plugin.formats.record import describe_source
from qalora_plugin.hub.card import find_subject, make_card, subject_of
from qalora_plugin.hub.push import push, push_merged

from .conftest import OWNER, TOKEN

LOSSES = [{"loss": 2.5, "step": 10}, {"eval_loss": 1.25, "step": 10}, {"train_loss": 2.0}]


def test_push(
    hub,
    merged_dir,
    capfd,
    caplog,
):
    caplog.set_level(logging.DEBUG)
    url = push_merged(merged_dir, "my-model", data="gsm8k", log_history=LOSSES)
    assert url == f"{hub.url}/{OWNER}/my-model"
    assert hub.repos == {f"{OWNER}/my-model": "private"}
    local = {path.name: path.read_bytes() for path in merged_dir.iterdir()}
    card = hub.files.pop("README.md").decode()
    assert hub.files == local and "README.md" not in local
    assert "Merging was exact" in card and "| training loss | 2.5000 (step 10) |" in card
    assert hub.committed_to == "main" and hub.branches == {}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + caplog.text
    assert not any(TOKEN.encode() in content for content in hub.files.values())


def test_where_a_base_was_read_from_stays_here(hub, merged_dir):
    """Of a source's path the name alone is published; the hashes are what finds it."""
    path = merged_dir / "config.json"
    config = json.loads(path.read_text())
    source = {"format": "gguf", "path": "/home/me/secret/model.gguf", "frozen": {}}
    config["quantization_config"]["base"]["source"] = source
    path.write_text(json.dumps(config))
    push_merged(merged_dir, "my-model")
    published = json.loads(hub.files["config.json"])
    assert published["quantization_config"]["base"]["source"] == source | {"path": "model.gguf"}
    published["quantization_config"]["base"]["source"] = source
    assert published == config == json.loads(path.read_text())


def test_where_the_base_of_an_adapter_lies_stays_here(hub, base_dir, tmp_path):
    adapter = random_adapter(open_quantized(base_dir), tmp_path / "adapter")
    out = export_model(adapter, tmp_path / "lora", "lora").out
    push(out, "my-adapter")
    published, local = hub.files["adapter_config.json"], (out / "adapter_config.json").read_bytes()
    assert json.loads(local)["base_model_name_or_path"] == str(base_dir)
    here = {"base_model_name_or_path": str(base_dir)}
    assert json.loads(published)["base_model_name_or_path"] == base_dir.name
    assert json.loads(published) | here == json.loads(local)


def test_files_that_are_not_as_we_write_them(merged_dir, tmp_path):
    model = shutil.copytree(merged_dir, tmp_path / "model")
    (model / "qalora_manifest.json").unlink()
    (model / "README.md").write_bytes("caf\xe9".encode("latin-1"))
    losses = [{"loss": None, "step": 1}, {"eval_loss": "low"}]
    push(model, "someone/model", log_history=losses, dry_run=True)
    (model / "README.md").unlink()
    push(model, "someone/model", log_history=losses, dry_run=True)
    (model / "quantization_report.json").write_text('{"layers": {"a": {"error": "small"}}}')
    with pytest.raises(OutputError, match=r"quantization_report\.json: layers\.a\.error: expected"):
        push(model, "someone/model", dry_run=True)


def test_public_repository_of_an_organisation_and_a_card_that_is_there(hub, merged_dir):
    (merged_dir / "README.md").write_text("mine")
    push_merged(merged_dir, "org/my-model", private=False)
    assert hub.repos == {"org/my-model": "public"}
    assert hub.files["README.md"] == b"mine"


def test_card(hub, merged_dir):
    subject = subject_of(open_quantized(merged_dir))
    card = make_card(subject, f"{OWNER}/my-model", "gsm8k", LOSSES)
    assert card.data.base_model == "org/tiny-base"
    assert "qalora" in card.data.tags and card.data.library_name == "transformers"
    assert "import qalora_plugin" in card.text
    assert "Needs the `qalora_plugin` package" in card.text
    for row in (
        "| base | [org/tiny-base](https://huggingface.co/org/tiny-base) |",
        "| bits | 3 |",
        "| group size | 16 |",
        "| adapted | zeros |",
        "| rank | 2 |",
        "| lora_alpha | 16 |",
        "| training data | gsm8k |",
        "| training loss | 2.5000 (step 10) |",
        "| evaluation loss | 1.2500 (step 10) |",
    ):
        assert row in card.text
    assert not re.search(r"[{}]", card.text)


def test_card_of_a_base_on_disk_has_its_licence_and_not_its_path(hub, merged_dir, base_dir):
    checkpoint = open_quantized(merged_dir)
    directory = base_dir.parent / "tiny-base"
    checkpoint.config.base["name_or_path"] = str(directory)
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "cc-by-4.0" and card.data.base_model is None
    assert "| base | tiny-base |" in card.text and str(directory) not in str(card)


def test_licence_of_a_base_without_a_card_is_that_of_its_config(hub, merged_dir, tmp_path):
    checkpoint = open_quantized(merged_dir)
    (tmp_path / "base-2").mkdir()
    (tmp_path / "base-2" / "config.json").write_text('{"license": "mit"}')
    checkpoint.config.base["name_or_path"] = str(tmp_path / "base-2")
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "mit"
    checkpoint.config.base["name_or_path"] = "unknown"
    (merged_dir / "LICENSE").write_text("...")
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.license == "other"


def test_a_licence_that_lies_about_is_not_the_bases(merged_dir, tmp_path, monkeypatch):
    checkpoint = open_quantized(merged_dir)
    for folder in (tmp_path, tmp_path / "base-3"):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    for name in (None, "base-3"):
        checkpoint.config.base["name_or_path"] = name
        assert describe_source(checkpoint)["licence"] is None


def test_refusals(hub, merged_dir, base_dir, monkeypatch):
    with pytest.raises(OutputError, match=r"is not a merged checkpoint\. Nothing was pushed"):
        push_merged(base_dir, "my-model")
    assert hub.repos == {}
    for name, status, advice in (
        ("unauthorized", 401, "hf auth login"),
        ("forbidden", 403, "write access"),
        ("missing", 404, "check the name"),
    ):
        with pytest.raises(OutputError, match=rf"{name}: .*HTTP {status}, .*{advice}") as caught:
            push_merged(merged_dir, name)
        assert f"qalora push {merged_dir} {name}" in str(caught.value)
        assert TOKEN not in str(caught.value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OutputError, match=f"complete in {merged_dir}"):
        push_merged(merged_dir, "my-model")


def test_command_pushes_an_export_to_a_branch(hub, exported_dir, tmp_path, capsys):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": LOSSES}))
    command = ["push", str(exported_dir), "org/my-export", "--branch", "int3", "--no-private"]
    assert main([*command, "--trainer-state", str(state), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["revision"], result["private"]) == ("torchao", "int3", False)
    assert result["url"] == f"{hub.url}/org/my-export"
    assert hub.repos == {"org/my-export": "public"}
    assert hub.branches == {"org/my-export": "int3"} and hub.committed_to == "int3"
    assert result["files"] == {name: len(content) for name, content in hub.files.items()}
    card = hub.files.pop("README.md").decode()
    assert hub.files == {path.name: path.read_bytes() for path in exported_dir.iterdir()}
    assert "Exact in fp32" in card and "pip install transformers torchao" in card
    assert "needs the `qalora_plugin`" not in card.lower()
    assert "| training loss | 2.5000 (step 10) |" in card and "| adapted | zeros |" in card
    assert "base_model: org/tiny-base" in card and "base_model_relation: quantized" in card


def test_dry_run_asks_nobody(hub, merged_dir, capsys, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert main(["push", str(merged_dir), "my-model", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "my-model (private, branch main): would push" in out
    for path in merged_dir.iterdir():
        assert f"{path.stat().st_size:,}  {path.name}" in out
    assert "README.md" in out and "Merging was exact" in out
    assert hub.tokens == set() and not (merged_dir / "README.md").exists()


def test_what_is_no_model_of_ours_is_not_pushed(hub, base_dir, tmp_path, capsys):
    stock = Path(__file__).parents[1] / "fixtures" / "gptq_4bit_g32_asym"
    (tmp_path / "empty").mkdir()
    for path in (base_dir.parent / "tiny-base", stock, tmp_path / "empty"):
        assert main(["push", str(path), "my-model"]) == 1
        assert "Nothing was pushed" in capsys.readouterr().err
    assert hub.tokens == set()


def test_a_base_and_its_exports_are_not_called_fine_tuned(base_dir, tmp_path):
    export_model(base_dir, tmp_path / "export", "torchao")
    for path in (base_dir, tmp_path / "export"):
        card = push(path, "someone/base", dry_run=True).card
        assert "quantized to INT3 (groups of 16), not fine-tuned." in card
        assert "QA-LoRA" not in card and "training data" not in card and "exact:" not in card
        with pytest.raises(OutputError, match="--data"):
            push(path, "someone/base", data="gsm8k", dry_run=True)


def test_other_bits_of_some_layers_are_told(merged_dir):
    checkpoint = open_quantized(merged_dir)
    assert "some layers" not in str(make_card(subject_of(checkpoint), "a/b", online=False))
    checkpoint.config.dynamic = {"q_proj": {"bits": 8}}
    card = make_card(subject_of(checkpoint), "a/b", online=False)
    assert "quantized to INT3 (groups of 16), some layers otherwise and fine-tuned" in card.text


def test_several_merged_adapters_are_fine_tuning_too(merged_dir):
    """What `merge_and_unload` of two adapters records."""
    checkpoint = open_quantized(merged_dir)
    adapters = [{"adapter": name, "adapt": "zeros", "r": 2} for name in "ab"]
    checkpoint.config.merged = {"adapter": "a, b", "adapters": adapters}
    card = make_card(subject_of(checkpoint), "someone/model", online=False)
    assert "fine-tuned with" in card.text and "fine-tuning is in the offsets." in card.text


def test_a_relative_path_is_no_repository(hub, merged_dir, tmp_path, monkeypatch):
    """`models/base` is one if such a directory is there, and then its last part is recorded."""
    assert public_name("models/base") == "models/base"
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/base") == "base" and public_name("") == ""
    assert public_name(".") == tmp_path.name
    checkpoint = open_quantized(merged_dir)
    checkpoint.config.base["name_or_path"] = "models/base"
    card = make_card(subject_of(checkpoint), "someone/my-model")
    assert card.data.base_model is None and "| base | base |" in card.text


def test_a_damaged_checkpoint_is_not_pushed(hub, merged_dir, tmp_path):
    damaged = shutil.copytree(merged_dir, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"^(?!.*neither).*XXH3-128 .*Nothing was pushed"):
            push(damaged, "my-model", dry_run=dry_run)
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["bad//name", "a/b/c", "na me"])
def test_names_that_are_no_repository(name, merged_dir):
    with pytest.raises(OutputError, match="expected NAME or ORG/NAME"):
        push(merged_dir, name, dry_run=True)


def test_trainer_state_has_to_be_one(merged_dir, tmp_path, capsys):
    command = ["push", str(merged_dir), "my-model", "--dry-run", "--trainer-state"]
    for path in (merged_dir / "config.json", tmp_path / "none.json"):
        assert main([*command, str(path)]) == 1
        assert "Expected the trainer_state.json of a checkpoint-N" in capsys.readouterr().err


def test_card_of_an_inexact_export_says_what_it_costs(merged_dir, exported_dir):
    """As `qalora export --format gptq --requantize` leaves it."""
    loss = {"exact": 2.0, "requantized": 2.25, "divergence": 0.01, "tokens": 99, "text": "t"}
    path = exported_dir / "qalora_export.json"
    record = json.loads(path.read_text())
    record |= {"format": "gptq", "measured": loss, "exactness": "Quantized again, not exact: ..."}
    path.write_text(json.dumps(record))
    card = make_card(find_subject(exported_dir), "someone/model", online=False)
    assert "Quantized again, not exact" in card.text and "Merging was exact" not in card.text
    assert "| loss of the exact model | 2.0000 (nats a token, 99 held-out tokens) |" in card.text
    assert "| loss of this model | 2.2500 (" in card.text
    assert "| KL divergence from the exact model | 1.00e-02 (" in card.text
    del record["measured"]["tokens"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"measured\.tokens is missing in qalora_export.json"):
        find_subject(exported_dir)


def test_result_of_a_push(hub, merged_dir):
    result = push(merged_dir, "my-model")
    assert result.as_text().startswith(f"{hub.url}/{OWNER}/my-model: pushed ")
    assert result.card.encode() == hub.files["README.md"]
