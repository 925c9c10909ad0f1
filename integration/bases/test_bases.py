"""Bases of other libraries, merged and given back, in the libraries that they came from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.random_adapter import random_adapter

from qalora_plugin import export_model, merge_adapter, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.hf.load import load_model
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.verify.export import verify_export

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parents[1] / "tests" / "fixtures"
OTHERS = ("ct_", "awq_", "autoround_")
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.name.startswith(OTHERS))


@pytest.fixture(scope="module")
def dequantize(programs, tmp_path_factory):
    """`dequantize(name, directory)` -> the weights as the owner of the format has them."""

    def run(name, directory):
        out = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        programs("bases")(HERE / "dequantize.py", name, directory, out)
        return load_file(out)

    return run


def test_the_fixtures_are_what_their_script_makes(env_python, run_python, tmp_path):
    run_python(env_python("bases"), HERE / "make_fixtures.py", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == NAMES
    for name in NAMES:
        for file in ("model.safetensors", "reference.safetensors"):
            made, kept = (load_file(folder / name / file) for folder in (tmp_path, FIXTURES))
            assert made.keys() == kept.keys()
            for key, tensor in made.items():
                assert torch.equal(tensor, kept[key]), f"{name}: {key}"


@pytest.mark.parametrize("name", NAMES)
def test_the_owner_loads_what_was_written_back(name, dequantize, tmp_path):
    base = FIXTURES / name
    random_adapter(open_quantized(base), tmp_path / "adapter", "scales", size=0.5)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base).out
    out = export_model(merged, tmp_path / "out", "original").out
    found, wanted = dequantize(name, out), open_quantized(merged)
    before = load_file(base / "reference.safetensors")
    for layer in wanted.layers:
        weight = wanted.layer(layer).dequantize().t()
        assert torch.equal(found[f"{layer}.weight"], weight)
        assert not torch.equal(weight, before[f"{layer}.weight"])
    if name.startswith(("awq", "autoround_8bit", "autoround_awq")):
        assert "logits" not in found  # see dequantize.py
        return
    with torch.no_grad():
        ours = load_model(wanted)(input_ids=torch.arange(24)[None]).logits
    error = (found["logits"] - ours).norm() / ours.norm()
    print(f"{name}: logits differ by {error:.1e}")
    assert error < (5e-3 if name.startswith("autoround") else 1e-6)  # it computes in fp16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_points", ["integer", "none"])
def test_compressed_tensors_exports_run_in_stock_transformers(
    bits, zero_points, env_python, tmp_path
):
    options = {"bits": bits, "method": "rtn", "zero_points": zero_points}
    quantize_model(base_model_path(), tmp_path / "base", **options)
    random_adapter(open_quantized(tmp_path / "base"), tmp_path / "adapter", "scales", size=0.05)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base").out
    out = export_model(merged, tmp_path / "out", "compressed-tensors").out
    report = verify_export(out, merged, run=True, python=env_python("bases"))
    assert report.largest_error == 0
    assert report.runtime is not None and report.runtime.not_run is None
    print(report.runtime.as_text())
