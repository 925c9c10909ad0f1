"""Formats that hold no integers with a scale are refused by name, at every door."""

import shutil
from types import SimpleNamespace

import pytest
from support.adapters import edit_json
from support.models import llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main as cli
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.tuner.targets import resolve_targets

METHODS = {
    "bitsandbytes": "NF4",
    "fp8": "FP8",
    "hqq": "groups that may lie along the outputs",
    "modelopt": "NVFP4",
    "mxfp4": "MXFP4",
}


@pytest.mark.parametrize("method", METHODS)
def test_refused_by_name(method, dense_dir, tmp_path, capsys):
    directory, what = shutil.copytree(dense_dir, tmp_path / "model"), METHODS[method]
    edit_json(directory / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(
        CheckpointError, match=f"{method!r}, which stores .*{what}.*qalora quantize"
    ):
        open_quantized(directory)
    with pytest.raises(CheckpointError, match=f"{method!r}, which stores .*{what}.*16-bit model"):
        AutoModelForCausalLM.from_pretrained(directory, quantization_config=QALoRAQuantConfig())
    for command in (["inspect", str(directory)], ["quantize", str(directory), "--method", "rtn"]):
        out = ["--out", str(directory / "out")] if command[0] == "quantize" else []
        assert cli([*command, *out]) == 1
        printed = capsys.readouterr()
        assert what in printed.out + printed.err
    assert not (directory / "out").exists()


def test_a_model_that_other_code_quantized_gets_no_adapter():
    model = llama()
    for config in (BitsAndBytesConfig(load_in_4bit=True), {"quant_method": "mxfp4"}):
        model.config = SimpleNamespace(quantization_config=config)
        with pytest.raises(ConfigError, match=r"which stores .*P4.*qalora quantize"):
            resolve_targets(QALoRAConfig(), model)
