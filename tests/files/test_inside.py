"""Nothing outside of a directory is read, and only regular files are."""

import os

import pytest
from support.adapters import edit_json

from qalora_plugin.checkpoint.side_files import copy_side_files
from qalora_plugin.errors import CheckpointError
from qalora_plugin.files.inside import open_regular, root_of
from qalora_plugin.files.json import read_json
from qalora_plugin.files.safetensors import read_header
from qalora_plugin.hub.card import Subject


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "private" / "key.json"
    path.parent.mkdir()
    path.write_text('{"secret": 1}')
    return path


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    return path


LINKS = {
    "absolute": lambda secret: str(secret),
    "relative": lambda secret: f"../private/{secret.name}",
    "through a link to a directory": lambda secret: f"inner/{secret.name}",
}


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "notes.txt", "chat_template.jinja"])
def test_a_link_that_leads_out_is_neither_copied_nor_sent(case, name, model, secret, tmp_path):
    (model / "inner").symlink_to(secret.parent)
    (model / name).symlink_to(LINKS[case](secret))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: leads out of its directory"):
        copy_side_files(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(CheckpointError, match="leads out of its directory"):
        Subject(model, "qalora", {}, "").files()
    with pytest.raises(CheckpointError, match=f"{name}: leads out"):
        open_regular(model / name)


def test_links_inside_are_followed(model, tmp_path):
    (model / "sub").mkdir()
    (model / "sub" / "a.json").write_text('{"a": 1}')
    (model / "config.json").symlink_to("sub/a.json")
    assert read_json(model / "config.json") == {"a": 1}
    (tmp_path / "link").symlink_to(model)  # a directory may be given by a link
    assert read_json(tmp_path / "link" / "sub" / "a.json") == {"a": 1}


def test_the_hub_cache_is_one_repository(tmp_path, secret):
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert read_json(snapshot / "config.json") == {"a": 1} and root_of(snapshot) == repository
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "abc").write_text("{}")
    for target in ("../../../models--org--other/blobs/abc", str(secret)):
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out"):
            read_json(snapshot / "config.json")


def make_pipe(path):
    os.mkfifo(path)


def make_device(path):
    path.symlink_to("/dev/zero")


def make_directory(path):
    path.mkdir()


def make_loop(path):
    path.symlink_to(path.name)


def make_dangling(path):
    path.symlink_to("nothing")


KINDS = {
    make_pipe: "found a pipe",
    make_device: "leads out of its directory, to /dev/zero",
    make_directory: "found a directory",
    make_loop: "cannot be read",
    make_dangling: "cannot be read",
}


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_only_regular_files_are_opened_and_nothing_waits(make, model):
    make(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=KINDS[make]):
        read_header(model / "model.safetensors")
    make(model / "config.json")
    with pytest.raises(CheckpointError, match=KINDS[make]):
        read_json(model / "config.json")


def test_a_file_that_is_mostly_holes_is_refused_at_once(model):
    header = b'{"a":{"dtype":"F32","shape":[75000000000],"data_offsets":[0,300000000000]}}'
    path = model / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 300_000_000_000)
    with pytest.raises(CheckpointError, match="the rest was never written"):
        read_header(path)


def test_other_kinds_of_files_are_neither_copied_nor_sent(model, tmp_path):
    os.mkfifo(model / "pipe.txt")
    with pytest.raises(CheckpointError, match="found a pipe"):
        copy_side_files(model, tmp_path)
    with pytest.raises(CheckpointError, match="found a pipe"):
        Subject(model, "qalora", {}, "").files()


def test_a_manifest_entry_that_is_a_link_out(model, secret):
    from qalora_plugin.files.manifest import check_manifest, write_manifest

    (model / "tokenizer.json").write_text('{"secret": 1}')
    write_manifest(model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.json").symlink_to(secret)  # the same content
    with pytest.raises(CheckpointError, match="leads out"):
        check_manifest(model)


def test_user_edits_stay_possible(model):
    (model / "config.json").write_text("{}")
    edit_json(model / "config.json", a=1)
    assert read_json(model / "config.json") == {"a": 1}
