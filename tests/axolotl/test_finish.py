"""What a run leaves and what it resumes from."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qalora_plugin.axolotl import finish
from qalora_plugin.errors import OutputError


class Config(SimpleNamespace):
    """Axolotl's config: keys as attributes and as items, None where there is none."""

    def __getattr__(self, key: str) -> Any:
        return None

    def get(self, key: str) -> Any:
        return getattr(self, key)

    __getitem__ = get

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)


def checkpoint(out: Path, step: int, state: str | None) -> None:
    (out / f"checkpoint-{step}").mkdir(parents=True)
    if state is not None:
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def test_the_newest_complete_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    complete = json.dumps({"global_step": 1})
    for step, state in ((9, complete), (10, complete), (11, '{"global_'), (12, None)):
        checkpoint(tmp_path, step, state)
    cfg = Config(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    finish.drop_torn_checkpoint(cfg)
    assert cfg.resume_from_checkpoint == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "settings",
    [{}, {"auto_resume_from_checkpoints": True, "resume_from_checkpoint": "checkpoint-1"}],
)
def test_what_the_user_says_is_left_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint(tmp_path, 1, json.dumps({"global_step": 1}))
    checkpoint(tmp_path, 2, None)
    cfg = Config(output_dir=str(tmp_path), **settings)
    finish.drop_torn_checkpoint(cfg)
    assert cfg.resume_from_checkpoint == settings.get("resume_from_checkpoint")


def test_an_earlier_merge_is_never_overwritten(tmp_path: Path) -> None:
    cfg = Config(
        output_dir=str(tmp_path), qalora={"merge_on_finish": True, "merge_formats": ["gguf"]}
    )
    finish.check_free(cfg)
    (tmp_path / "merged.gguf").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"merged\.gguf"):
        finish.check_free(cfg)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="nothing is overwritten"):
        finish.check_free(cfg)
    finish.check_free(Config(output_dir=str(tmp_path), qalora={"merge_on_finish": False}))


def test_pushing_needs_a_hub_model_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The push itself is tested in test_hub.py; here, when and where to."""
    pushed: list[tuple[Any, ...]] = []

    def push_merged(directory: Path, repo_id: str, **facts: Any) -> str:
        pushed.append((directory, repo_id, facts))
        return "address"

    monkeypatch.setattr(finish, "push_merged", push_merged)
    history = [{"loss": 1.0, "step": 1}]
    finish.push(Config(), tmp_path, history)
    assert pushed == []
    finish.push(Config(hub_model_id="me/m", datasets=[{"path": "d"}]), tmp_path, history)
    assert pushed == [(tmp_path, "me/m-merged", {"data": "d", "log_history": history})]
