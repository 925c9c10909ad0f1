"""What a run leaves and what it resumes from."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.gguf_files import write_gguf
from support.random_adapter import random_adapter

from qalora_plugin.axolotl import finish
from qalora_plugin.axolotl.base import check_calibration
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.errors import ConfigError, OutputError

FIXTURES = Path(__file__).parents[1] / "fixtures"
STOCK = FIXTURES / "gptq_4bit_g32_asym"


class Config(SimpleNamespace):
    """Axolotl's config: keys as attributes and as items, None where there is none."""

    def __getattr__(self, key):
        return None

    def get(self, key):
        return getattr(self, key)

    __getitem__ = get

    def __setitem__(self, key, value):
        setattr(self, key, value)


def checkpoint(out, step, state):
    (out / f"checkpoint-{step}").mkdir(parents=True)
    if state is not None:
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text(state)


def test_the_newest_complete_checkpoint_is_resumed_from(tmp_path):
    complete = json.dumps({"global_step": 1})
    for step, state in ((9, complete), (10, complete), (11, '{"global_'), (12, None)):
        checkpoint(tmp_path, step, state)
    cfg = Config(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    finish.drop_torn_checkpoint(cfg)
    assert cfg.resume_from_checkpoint == str(tmp_path / "checkpoint-10")


def test_without_a_complete_checkpoint_training_starts_over(tmp_path):
    checkpoint(tmp_path, 9, None)
    cfg = Config(output_dir=str(tmp_path), auto_resume_from_checkpoints=True)
    finish.drop_torn_checkpoint(cfg)
    assert not cfg.auto_resume_from_checkpoints and not cfg.resume_from_checkpoint


@pytest.mark.parametrize(
    "settings",
    [{}, {"auto_resume_from_checkpoints": True, "resume_from_checkpoint": "checkpoint-1"}],
)
def test_what_the_user_says_is_left_alone(tmp_path, settings):
    checkpoint(tmp_path, 1, json.dumps({"global_step": 1}))
    checkpoint(tmp_path, 2, None)
    cfg = Config(output_dir=str(tmp_path), **settings)
    finish.drop_torn_checkpoint(cfg)
    assert cfg.resume_from_checkpoint == settings.get("resume_from_checkpoint")


def test_an_earlier_merge_is_never_overwritten(tmp_path):
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


def formats(tmp_path, *names, **keys):
    block = {"merge_on_finish": True, "zero_points": "real", "desc_act": False, "adapt": "scales"}
    block |= {"merge_formats": list(names), **keys}
    return Config(output_dir=str(tmp_path), qalora=block)


def test_the_bases_own_file(tmp_path):
    """`original` goes back into a file or a directory, as the base came."""
    file = write_gguf(tmp_path / "model.gguf")
    base = import_model(file, tmp_path / "base").out
    for given, name in ((base, "merged-original.gguf"), (STOCK, "merged-original")):
        cfg = formats(tmp_path, "original")
        cfg["base_model"] = str(given)
        assert finish.export_paths(cfg) == {"original": tmp_path / name}
        finish.check_formats(cfg, given)
    cfg.qalora["adapt"] = "zeros"
    with pytest.raises(ConfigError, match=r"cannot take that back .* Set adapt: scales"):
        finish.check_formats(cfg, STOCK)
    with pytest.raises(ConfigError, match="the base is quantized in this run"):
        finish.check_formats(cfg, None)


def test_exports_that_would_fail_are_refused_before_training(tmp_path):
    """By the settings while the base is a 16-bit model; by the layers of a quantized one."""
    for format, keys, why in (
        ("gptq", {}, "zero_points: integer"),
        ("mlx", {"desc_act": True}, "desc_act: false"),
    ):
        cfg = formats(tmp_path, format, **keys)
        with pytest.raises(ConfigError, match=rf"merge_formats: {format} .*{why}"):
            finish.check_formats(cfg, None)
    act_order = FIXTURES / "gptq_4bit_g32_sym_actorder"
    for format in ("mlx", "torchao"):
        with pytest.raises(ConfigError, match=rf"merge_formats: {format} .*act-order"):
            finish.check_formats(formats(tmp_path, format), act_order)
    finish.check_formats(formats(tmp_path, "gptq", zero_points="none"), None)
    with pytest.raises(ConfigError, match=r"merge_formats: gptq .*zero-points of 0"):
        finish.check_formats(formats(tmp_path, "gptq"), FIXTURES / "gptq_4bit_g32_asym_zero0")
    fine = formats(tmp_path, "qalora", "gptq", "torchao", "mlx")
    finish.check_formats(fine, FIXTURES / "gptq_4bit_g32_asym")
    fine = formats(tmp_path, "lora", adapt="zeros")
    finish.check_formats(fine, FIXTURES / "gptq_4bit_g32_asym")
    finish.check_formats(formats(tmp_path, "gptq", merge_on_finish=False), None)


def test_a_missing_library_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"merge_formats: gguf .*pip install"):
        finish.check_formats(formats(tmp_path, "gguf"), None)


def test_failed_exports_are_named_and_the_others_written(tmp_path):
    shutil.copytree(FIXTURES / "gptq_4bit_g32_sym_actorder", tmp_path / "merged")
    with pytest.raises(OutputError, match=r"^mlx: .*act-order"):
        finish.export(formats(tmp_path, "mlx", "gptq"), tmp_path)
    assert (tmp_path / "merged-gptq" / "config.json").is_file()


def test_a_calibration_file_has_to_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"calibration: none\.txt: no such file"):
        check_calibration(Config(qalora={"calibration": "none.txt"}))
    (tmp_path / "text.txt").write_text("x")
    check_calibration(Config(qalora={"calibration": str(tmp_path / "text.txt")}))
    check_calibration(Config(qalora={"calibration": None}))


def test_pushing_needs_a_hub_model_id(monkeypatch, tmp_path):
    """The push itself is tested in tests/hub; here, when and where to."""
    pushed: list[tuple[Any, ...]] = []

    def push_merged(directory, repo_id, **facts):
        pushed.append((directory, repo_id, facts))
        return "address"

    monkeypatch.setattr(finish, "push_merged", push_merged)
    history = [{"loss": 1.0, "step": 1}]
    finish.push(Config(), tmp_path, history)
    assert pushed == []
    finish.push(Config(hub_model_id="me/m", datasets=[{"path": "d"}]), tmp_path, history)
    assert pushed == [(tmp_path, "me/m-merged", {"data": "d", "log_history": history})]


def test_merged_already_is_said_or_another_result_refused(tmp_path, caplog):
    base = open_quantized(STOCK)
    tasks = {"lm_eval_tasks": ["arc_easy:5", "mmlu"]}
    cfg = Config(output_dir=str(random_adapter(base, tmp_path / "run")), **tasks)
    assert finish.merged_before(cfg, tmp_path / "run") is None
    with caplog.at_level("INFO"):
        finish.merge(cfg, tmp_path / "run")
    assert f"type `qalora eval {tmp_path / 'run' / 'merged'} --tasks arc_easy,mmlu`" in caplog.text
    said = finish.merged_before(cfg, tmp_path / "run")
    assert f"all {len(base.layers)} layers are the same" in said and "\n" not in said
    other = random_adapter(base, tmp_path / "other", size=0.05)
    with pytest.raises(ConfigError, match=r"another result .*qalora verify"):
        finish.merged_before(cfg, other)
