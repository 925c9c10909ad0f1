"""Mixtures of experts: GPTQ on the tokens that the router sends each expert."""

import pytest
import torch
from support.mixtures import LINEARS, mixture
from transformers import AutoModelForCausalLM

from qalora_plugin import quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.files.json import read_json
from qalora_plugin.files.writer import ShardWriter
from qalora_plugin.quantize.gptq import Hessian, gptq
from qalora_plugin.quantize.pipeline import ModelSource
from qalora_plugin.quantize.source import choose_layers

GRID = dict(bits=3, group_size=16, progress=False)


def _windows(samples):
    return torch.randint(0, 64, (samples, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe", "deepseek_v3"])
def test_calibrated_experts(name, tmp_path):
    mixture(name).save_pretrained(tmp_path / "dense")
    found = quantize_model(tmp_path / "dense", tmp_path / "q", calibration=_windows(9), **GRID)
    rounded = quantize_model(tmp_path / "dense", tmp_path / "rtn", method="rtn", **GRID)
    assert found.layers.keys() == rounded.layers.keys() and len(found.layers) == LINEARS[name]
    assert all(0 < layer["error"] < 0.2 for layer in found.layers.values())
    experts = 8 if name == "deepseek_v3" else 16
    assert found.experts["calibrated"] == experts
    assert 0 < found.experts["few_tokens"] < experts and rounded.experts is None
    assert read_json(tmp_path / "q" / "quantization_report.json")["experts"] == found.experts


def test_an_expert_is_solved_on_the_tokens_that_it_gets(tmp_path):
    """Its first layer's integers are those of GPTQ on the routed tokens, recorded another way."""
    model = mixture("qwen3_moe")
    model.save_pretrained(tmp_path / "dense")
    only = {"modules_to_not_convert": ["self_attn", "layers.1"]}
    windows = _windows(9)
    quantize_model(tmp_path / "dense", tmp_path / "q", calibration=windows, **GRID, **only)
    seen = {}

    def watch(module, args):
        seen["states"], seen["chosen"], _ = args

    model.model.layers[0].mlp.experts.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(windows)
    stored = open_quantized(tmp_path / "q")
    solved = 0
    for expert in range(8):
        tokens = seen["states"][(seen["chosen"] == expert).any(-1)]
        if len(tokens) < 32:
            tokens = seen["states"]
        hessian = Hessian(32)
        hessian.add(tokens)
        weight = model.model.layers[0].mlp.experts.gate_up_proj[expert, :44].detach()
        layer = stored.layer(f"model.layers.0.mlp.experts.{expert}.gate_proj")
        wanted = gptq(weight, hessian.mean("x"), layer.spec)
        solved += torch.equal(wanted.qweight, layer.qweight)
    assert solved >= 7  # sums in another order may round one weight otherwise


def test_resumed_and_refined(tmp_path, monkeypatch):
    """A run that stopped in the second block ends in the same bytes and counts."""
    mixture("olmoe").save_pretrained(tmp_path / "dense")
    options = dict(calibration=_windows(24), refine=True, refine_steps=2, refine_batch=2, **GRID)
    whole = quantize_model(tmp_path / "dense", tmp_path / "whole", **options)
    from qalora_plugin.quantize import walk

    solve, calls = walk.gptq, 0

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(walk, "gptq", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(tmp_path / "dense", tmp_path / "again", **options)
    again = quantize_model(tmp_path / "dense", tmp_path / "again", **options)
    assert again.resumed == 1 and again.experts == whole.experts
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_kept_experts_stay_in_16_bits(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    kept = {"modules_to_not_convert": ["experts"]}
    found = quantize_model(
        tmp_path / "dense", tmp_path / "q", calibration=_windows(8), **GRID, **kept
    )
    assert len(found.layers) == 8 and found.experts is None
    source = ModelSource(tmp_path / "dense")
    assert len(choose_layers(source, open_quantized(tmp_path / "q").config)) == 8
    stored = open_quantized(tmp_path / "q").reader
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    assert torch.equal(stored.get(name), source.reader.get(name))
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert found.kept == [*names, "lm_head"]  # by one name, not one for every projection


def test_kept_experts_stay_fused_where_the_files_hold_them_so(tmp_path):
    model = mixture("granitemoe")
    model.save_pretrained(tmp_path / "dense")
    kept = {"modules_to_not_convert": ["experts"]}
    found = quantize_model(
        tmp_path / "dense", tmp_path / "q", calibration=_windows(8), **GRID, **kept
    )
    assert len(found.layers) == 8
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    name = "model.layers.1.block_sparse_moe.experts.gate_up_proj"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name))


def test_experts_are_counted_once_where_a_block_is_written_twice(tmp_path, monkeypatch):
    """A run is stopped when the report has a block whose file has not got its name yet."""
    mixture("olmoe").save_pretrained(tmp_path / "dense")
    whole = quantize_model(tmp_path / "dense", tmp_path / "whole", calibration=_windows(9), **GRID)
    close = ShardWriter.close

    def stop(self):
        if "00003-of" in self.path.name:
            raise KeyboardInterrupt
        close(self)

    again = {"calibration": _windows(9), **GRID}
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(tmp_path / "dense", tmp_path / "again", **again)
    assert quantize_model(tmp_path / "dense", tmp_path / "again", **again).experts == whole.experts
