"""Damaged, incomplete, unsupported adapters: one clear error each, before anything is written."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import edit_json, edit_tensors

from qalora_plugin.errors import AdapterError, CheckpointError
from qalora_plugin.merge.adapter import open_adapter, open_base

Make = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj"
A = f"base_model.model.{Q_PROJ}.qalora_A.weight"
B = f"base_model.model.{Q_PROJ}.qalora_B.weight"


@pytest.fixture
def adapter_dir(base_dir, make_adapter):
    return make_adapter(base_dir)


def test_a_directory_without_an_adapter_says_what_it_is(base_dir, adapter_dir, tmp_path):
    with pytest.raises(AdapterError, match=r"this is a model, not an adapter\. Give the"):
        open_adapter(base_dir)
    (tmp_path / "run").mkdir()
    with pytest.raises(AdapterError, match=r"this is no adapter\. Give the directory"):
        open_adapter(tmp_path / "run")
    shutil.copytree(adapter_dir, tmp_path / "run" / "checkpoint-1")
    with pytest.raises(AdapterError, match=r"this is no adapter\. Did you mean .*checkpoint-1"):
        open_adapter(tmp_path / "run")


def test_reads_layers_ranks_and_scaling(base_dir, make_adapter):
    plain = open_adapter(make_adapter(base_dir))
    assert len(plain.layers) == 14
    assert plain.layers[Q_PROJ].rank == 4
    assert plain.layers[Q_PROJ].scaling == 6 / 4
    patterns = {"rank_pattern": {".*": 4}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
    adapter = make_adapter(base_dir, name="patterned", r=8, use_rslora=True, **patterns)
    patterned = open_adapter(adapter).layers
    assert patterned[Q_PROJ].scaling == 3 / 2
    assert patterned[Q_PROJ.replace("q_proj", "k_proj")].scaling == 6 / 2


def test_its_base_is_found_from_anywhere(base_dir, make_adapter, tmp_path, monkeypatch):
    run = tmp_path / "run" / "out"
    run.mkdir(parents=True)
    base = shutil.copytree(base_dir, run / "base-int4")
    # as a process in the folder `run` wrote it
    adapter = make_adapter(base, name="run/out/adapter", base_model_name_or_path="out/base-int4")
    for here in (tmp_path / "run", tmp_path, run, adapter, Path("/")):
        monkeypatch.chdir(here)
        assert open_base(open_adapter(adapter), None).directory.samefile(base)
    monkeypatch.chdir(adapter)
    assert open_base(open_adapter("."), None).directory.samefile(base)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    moved = (tmp_path / "run").rename(tmp_path / "moved") / "out"
    assert open_base(open_adapter(moved / "adapter"), None).directory == moved / "base-int4"
    (moved / "base-int4").rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=r"no directory beside or above.*with --base"):
        open_base(open_adapter(moved / "adapter"), None)


def test_is_not_changed_after_it_was_read(adapter_dir):
    with pytest.raises(dataclasses.FrozenInstanceError):
        open_adapter(adapter_dir).layers = {}  # type: ignore[misc]


BAD_TENSORS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "missing A": (lambda t: t.pop(A), "missing key .*q_proj.qalora_A"),
    "missing B": (lambda t: t.pop(B), "missing key .*q_proj.qalora_B"),
    "extra matrix": (
        lambda t: t.update({A.replace("qalora_A", "qalora_scale_A"): torch.ones(4, 2)}),
        "extra key .*qalora_scale_A",
    ),
    "foreign name": (lambda t: t.update({"q_proj.A": torch.ones(2)}), "key q_proj.A: expected"),
    "wrong rank of A": (lambda t: t.update({A: torch.ones(5, 2)}), r"q_proj.qalora_A.*rank 4"),
    "wrong rank of B": (lambda t: t.update({B: torch.ones(64, 5)}), r"q_proj.qalora_B.*rank 4"),
    "A not a matrix": (lambda t: t.update({A: torch.ones(4)}), r"q_proj.qalora_A.*found \[4\]"),
    "nan": (lambda t: t[B].fill_(torch.nan), "q_proj.qalora_B.weight holds NaN"),
    "infinity": (lambda t: t[A].fill_(torch.inf), "q_proj.qalora_A.weight holds NaN or infinity"),
    "nothing": (lambda t: t.clear(), "nothing to merge"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors(case, adapter_dir):
    change, message = BAD_TENSORS[case]
    edit_tensors(adapter_dir, change)
    with pytest.raises(AdapterError, match=message):
        open_adapter(adapter_dir)


def test_parts_that_differ_in_shape(base_dir, make_adapter):
    adapter = make_adapter(base_dir, adapt="both")
    edit_tensors(adapter, lambda t: t.update({A: torch.ones(4, 3)}))
    with pytest.raises(AdapterError, match=r"q_proj.*differ in shape"):
        open_adapter(adapter)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "expected peft_type QALORA"),
    "dora": ({"use_dora": True}, "trained with use_dora"),
    "bias": ({"bias": "all"}, "trained with bias"),
    "adapt": ({"adapt": "weights"}, "adapt must be one of"),
    "no rank": ({"r": -1}, "r must be a positive integer"),
    "alpha": ({"lora_alpha": "x"}, "lora_alpha: expected a valid number"),
    "alpha of 0": ({"lora_alpha": 0}, "lora_alpha must be a positive number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha must be a positive number, found None"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case, adapter_dir):
    changes, message = BAD_CONFIGS[case]
    edit_json(adapter_dir, **changes)
    with pytest.raises(AdapterError, match=f"adapter_config.json: .*{message}"):
        open_adapter(adapter_dir)


def test_truncated_file(adapter_dir):
    weights = adapter_dir / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: truncated"):
        open_adapter(adapter_dir)


def test_pickle_is_never_read(adapter_dir):
    weights = adapter_dir / "adapter_model.safetensors"
    weights.rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle, which can run code"):
        open_adapter(adapter_dir)


def test_conventions(base_dir, adapter_dir, make_foreign):
    ours = open_adapter(adapter_dir)
    assert ours.convention() == "sum"
    with pytest.raises(AdapterError, match="trained with the convention 'sum'"):
        ours.convention("mean")
    peft = open_adapter(make_foreign(base_dir, 4, use_qalora=True))
    assert peft.convention() == peft.convention("peft") == "peft"
    with pytest.raises(AdapterError, match="trained with the convention 'peft'"):
        peft.convention("mean")
    silent = open_adapter(make_foreign(base_dir, 32, use_qalora=False, name="authors"))
    assert silent.convention("mean") == "mean"
    with pytest.raises(AdapterError, match="does not say how it pools"):
        silent.convention()
    with pytest.raises(AdapterError, match="convention must be auto or one of"):
        silent.convention("median")
