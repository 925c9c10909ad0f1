"""The report of a training: written by `MergeCallback`, and again by `qalora report`."""

import json
import shutil

import pytest
from support.random_adapter import random_adapter

from qalora_plugin import MergeCallback, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import ConfigError
from qalora_plugin.report.charts import has_charts
from qalora_plugin.report.figures import collect
from qalora_plugin.report.page import write_report
from qalora_plugin.training.figures import layer_changes


def test_a_training_ends_with_its_report(bases, make_trainer, tmp_path, capsys):
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(tmp_path / "merged")])
    trainer.train()
    run = tmp_path / "run"
    figures = json.loads((run / "report.json").read_text())
    assert figures["history"] == trainer.state.log_history
    assert figures["seconds"]["train"] > 0 and figures["memory"]["peak of the process"] > 1e8
    trained = layer_changes(trainer.model)["offset_change"]
    found = {
        name.removeprefix("model."): v for name, v in figures["changes"]["offset_change"].items()
    }
    assert found.keys() == trained.keys()  # merged offsets are rounded to fp16
    assert found == pytest.approx(trained, rel=0.1)
    assert figures["files"]["qalora"] > 0 and "proof" not in figures
    assert str(tmp_path / "merged") in figures["commands"]["qalora"]
    assert ("<svg" in (run / "report.html").read_text()) == has_charts()

    capsys.readouterr()
    assert main(["report", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["proof"]["layers"] == len(trained)
    assert again["history"] == figures["history"]


def test_what_a_later_report_keeps_of_an_earlier_one(bases, make_trainer, tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(bases["ours"], callbacks=[MergeCallback(run / "merged")])
    trainer.train()
    write_report(run, verify=True, settings={"steps": 2})
    for _ in range(2):
        write_report(run)
        figures = json.loads((run / "report.json").read_text())
        assert figures["recipe"]["steps"] == 2 and figures["proof"]["layers"] > 0
    for name in ("adapter", "merged"):
        shutil.rmtree(run / name)
    random_adapter(open_quantized(bases["ours"]), run / "adapter")
    merge_adapter(run / "adapter", run / "merged")
    write_report(run)
    assert "proof" not in json.loads((run / "report.json").read_text())  # of what is gone
    assert "Not verified here" in (run / "report.html").read_text()


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected the directory of a run"):
        collect(tmp_path)
