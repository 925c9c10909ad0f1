"""A Hub that refuses, changes or goes away: one error of ours, and what is local stays."""

import pytest

from qalora_plugin.errors import CheckpointError, OutputError
from qalora_plugin.files.hub import resolve_model_dir
from qalora_plugin.hub.push import push

from .conftest import TOKEN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conflict", r"HTTP 409, it is being changed by someone else"),
        ("changed", r"HTTP 412, it has changed meanwhile"),
        ("overloaded", r"HTTP 500, "),
        ("dropped", r"the Hub did not take it \(\w*Error: "),
    ],
)
def test_a_commit_that_fails(name, message, hub, merged_dir):
    with pytest.raises(OutputError, match=message) as caught:
        push(merged_dir, name)
    assert f"It is complete in {merged_dir}" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert (merged_dir / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["org/dropped", "org/nothing", "org/", "a/b", "--"])
def test_a_model_that_the_hub_does_not_give(name, hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such directory, and the Hub did not give it"):
        resolve_model_dir(name)


def test_a_changed_file_is_not_pushed(hub, merged_dir):
    path = merged_dir / "generation_config.json"
    path.write_text("{}")
    with pytest.raises(OutputError, match=r"generation_config\.json.*Nothing was pushed"):
        push(merged_dir, "someone/model", dry_run=True)


def test_a_link_out_is_not_pushed(hub, merged_dir, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (merged_dir / "notes.md").symlink_to(tmp_path / "secret")
    with pytest.raises((OutputError, CheckpointError), match=r"notes\.md: leads out"):
        push(merged_dir, "someone/model", dry_run=True)
    assert hub.repos == {}
