"""The manifest: every file, every door, once."""

import hashlib
import json
import shutil

import pytest
from support.adapters import edit_json

from qalora_plugin.errors import CheckpointError
from qalora_plugin.files import digests, manifest
from qalora_plugin.files.atomic import AtomicDirectory, atomic_file
from qalora_plugin.files.manifest import (
    accept_edits,
    check_manifest,
    checked_beside,
    start_check,
    unchecked_hashes,
    write_manifest,
)
from qalora_plugin.files.names import MANIFEST_FILE


@pytest.fixture
def directory(tmp_path):
    """What a model directory may hold; the manifest does not look into it."""
    path = tmp_path / "model"
    (path / "additional_chat_templates").mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama", "use_cache": true}')
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        ".gitattributes",
        "additional_chat_templates/tools.jinja",
    ):
        (path / name).write_text(f"{name}: some content")
    write_manifest(path)
    return path


def flip(path, at=3, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_a_flipped_bit_is_found_in_every_file(name, directory):
    assert check_manifest(directory)
    flip(directory / name)
    with pytest.raises(CheckpointError, match=f"{name}: XXH3-128 .*, qalora_manifest.json says"):
        check_manifest(directory)


def test_what_users_edit_or_git_adds_is_not_covered(directory):
    for name in ("README.md", ".gitattributes"):
        (directory / name).write_text("edited")
    (directory / "eval_results.txt").write_text("added")
    (directory / ".git").mkdir()
    (directory / ".git" / "HEAD").write_text("x")
    edit_json(directory / "config.json", use_cache=False)
    assert check_manifest(directory)


NOT_COMPLETE = {
    "files is empty": (lambda d, m: m.update(files={}), "is not in qalora_manifest.json"),
    "a shard is not listed": (
        lambda d, m: (d / "model-2.safetensors").write_text("x"),
        r"model-2\.safetensors: is not in",
    ),
    "weights are gone": (lambda d, m: (d / "model.safetensors").unlink(), "missing, but"),
    "a tokenizer is gone": (lambda d, m: (d / "tokenizer.json").unlink(), "missing, but"),
    "truncated": (lambda d, m: (d / "tokenizer.json").write_text("x"), "1 bytes, .* says 28 bytes"),
    "absolute": (lambda d, m: m["files"].update({"/etc/passwd": ENTRY}), "not a file of this"),
    "above": (lambda d, m: m["files"].update({"../x": ENTRY}), "not a file of this"),
    "above, later": (lambda d, m: m["files"].update({"a/../../x": ENTRY}), "not a file of this"),
    "empty name": (lambda d, m: m["files"].update({"": ENTRY}), "not a file of this"),
    "a directory": (lambda d, m: m["files"].update({".": ENTRY}), "not a file of this|a directory"),
    "no digest": (lambda d, m: m["files"].update({"x": {"size": 1}}), "xxh3_128 or sha256, found"),
    "size as text": (lambda d, m: m["files"]["tokenizer.json"].update(size="28"), "valid integer"),
    "entry is a list": (lambda d, m: m["files"].update({"x": []}), "expected a valid dict"),
    "newer": (lambda d, m: m.update(version=4), "Update qalora-plugin"),
    "no version": (lambda d, m: m.pop("version"), "version: missing"),
    "bound to something else": (lambda d, m: m["bound"].update({"x.json": {}}), "is no config"),
    "config changed": (lambda d, m: edit_json(d / "config.json", model_type="gpt2"), "model_type"),
    "config gone": (lambda d, m: (d / "config.json").unlink(), "config.json: cannot be read"),
}
ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize("case", NOT_COMPLETE)
def test_a_manifest_that_does_not_fit_is_refused(case, directory):
    change, message = NOT_COMPLETE[case]
    stated = json.loads((directory / MANIFEST_FILE).read_text())
    change(directory, stated)
    (directory / MANIFEST_FILE).write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=message):
        check_manifest(directory)


def test_sizes_are_compared_before_anything_is_hashed(directory, monkeypatch):
    (directory / "tokenizer.json").write_text("x")
    monkeypatch.setattr(digests, "file_digest", lambda *_: pytest.fail("hashed"))
    with pytest.raises(CheckpointError, match="1 bytes"):
        check_manifest(directory)


def sha256_entry(path):
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_version_2_has_sha256(directory):
    stated = json.loads((directory / MANIFEST_FILE).read_text())
    stated |= {"version": 2, "files": {n: sha256_entry(directory / n) for n in stated["files"]}}
    (directory / MANIFEST_FILE).write_text(json.dumps(stated))
    assert check_manifest(directory)
    flip(directory / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: SHA-256"):
        check_manifest(directory)
    assert accept_edits(directory) == sorted(stated["files"])  # all have the new hash now
    assert check_manifest(directory)


def test_version_1_lists_weights_alone(directory):
    weights = directory / "model.safetensors"
    entry = sha256_entry(weights)
    value = {"version": 1, "files": {weights.name: entry}}
    (directory / MANIFEST_FILE).write_text(json.dumps(value))
    flip(directory / "tokenizer.json")
    assert check_manifest(directory)
    flip(weights)
    with pytest.raises(CheckpointError, match="SHA-256"):
        check_manifest(directory)


def test_hashes_can_be_left_out_and_it_is_said(directory, caplog, monkeypatch):
    flip(directory / "model.safetensors")
    with unchecked_hashes():
        assert check_manifest(directory) is False
    assert "hashes are not checked" in caplog.text and str(directory) in caplog.text
    assert "--no-hash-check" in caplog.text and "QALORA_NO_HASH_CHECK" not in caplog.text
    monkeypatch.setenv("QALORA_NO_HASH_CHECK", "1")
    assert check_manifest(directory) is False
    assert "as QALORA_NO_HASH_CHECK says" in caplog.text
    edit_json(directory / "config.json", model_type="gpt2")  # configs are compared all the same
    with pytest.raises(CheckpointError, match="model_type"):
        check_manifest(directory)
    monkeypatch.setenv("QALORA_NO_HASH_CHECK", "0")
    with pytest.raises(CheckpointError):
        check_manifest(directory)


def test_a_manifest_of_a_newer_release_is_not_written_over(directory):
    path = directory / "qalora_manifest.json"
    text = json.dumps(json.loads(path.read_text()) | {"version": 4})
    path.write_text(text)
    with pytest.raises(CheckpointError, match="Update qalora-plugin"):
        accept_edits(directory)
    assert path.read_text() == text


def test_edits_of_ones_own_are_accepted_but_never_of_weights(directory):
    (directory / "generation_config.json").write_text("{}")
    (directory / "tokenizer.json").unlink()
    (directory / "new.jinja").write_text("new")
    with pytest.raises(CheckpointError):
        check_manifest(directory)
    assert accept_edits(directory) == ["generation_config.json", "new.jinja", "tokenizer.json"]
    assert check_manifest(directory)
    flip(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from"):
        accept_edits(directory)
    edit_json(directory / "config.json", model_type="gpt2")
    with pytest.raises(CheckpointError):
        accept_edits(directory)


def test_no_manifest(directory):
    (directory / MANIFEST_FILE).unlink()
    assert check_manifest(directory) is False
    with pytest.raises(CheckpointError, match="nothing to accept"):
        accept_edits(directory)


def test_a_check_in_the_background_raises_when_it_is_asked(directory):
    assert start_check(directory).result() is True
    flip(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="XXH3-128"):
        start_check(directory).result()


def test_nothing_gets_its_name_before_a_check_beside_the_work_has_passed(directory, tmp_path):
    for target in ("good", "bad"):
        outputs = [tmp_path / f"{target}-{kind}" for kind in ("directory", "file")]
        try:
            with checked_beside(directory):
                assert check_manifest(directory)  # is not waited for
                with AtomicDirectory(outputs[0]) as partial:
                    (partial / "a").write_text("written meanwhile")
                with atomic_file(outputs[1]) as partial:
                    partial.write_text("written meanwhile")
        except CheckpointError as error:
            assert "tokenizer.json: XXH3-128" in str(error) and target == "bad"
        assert [path.exists() for path in outputs] == [target == "good"] * 2
        assert not list(tmp_path.glob(".*"))
        flip(directory / "tokenizer.json")


def test_a_damaged_file_explains_what_fails_beside_its_check(directory):
    with pytest.raises(ValueError, match="of its own"), checked_beside(directory):
        raise ValueError("of its own")
    flip(directory / "tokenizer.json")
    with pytest.raises(CheckpointError, match="XXH3-128"), checked_beside(directory):
        raise ValueError("a number that is not finite")
    assert not manifest._beside.get()


def test_in_the_hub_cache_files_other_than_weights_may_be_missing(directory, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    shutil.copytree(directory, snapshot)
    (snapshot / "tokenizer.json").unlink()
    assert check_manifest(snapshot)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        check_manifest(snapshot)


def test_names_are_added_to_a_manifest_that_is_there(directory):
    (directory / "adapter_model.safetensors").write_text("adapter")
    with pytest.raises(CheckpointError, match="is not in"):
        check_manifest(directory)
    write_manifest(directory, ["adapter_model.safetensors"])
    assert check_manifest(directory)
    (directory / MANIFEST_FILE).write_text("{")  # what a kill left does not stop a training
    write_manifest(directory, ["adapter_model.safetensors", "model.safetensors"])
    assert check_manifest(directory)
