"""Bits chosen by measured sensitivity: the measure, the choice, and what is written."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from support.architectures import save, token_ids

from qalora_kernels import QuantSpec
from qalora_plugin import QuantizeOptions
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import ConfigError
from qalora_plugin.quantize import allocate as allocating
from qalora_plugin.quantize.allocate import BitChooser, Candidate, allocate, stored_bits
from qalora_plugin.quantize.divergence import divergence
from qalora_plugin.quantize.pipeline import quantize_model
from qalora_plugin.quantize.source import ModelSource, choose_layers

COMMON = {"bits": "auto", "group_size": 16, "seq_len": 16, "samples": 8, "progress": False}


def _run(source, out, **settings):
    return quantize_model(source, out, **{"calibration": token_ids(8, 16), **COMMON, **settings})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save("qwen2", tmp_path_factory.mktemp("source") / "model")


def _spec(bits, k=64, n=8):
    return QuantSpec(bits, 16, k, n)


def test_the_best_return_for_a_bit_is_bought_first():
    costs = {"a": (9.0, 2.0, 1.0, 0.9), "b": (4.0, 3.5, 0.2, 0.1), "c": (1.0, 0.5, 0.4, 0.39)}
    layers = {
        name: [Candidate(_spec(bits), cost) for bits, cost in zip((2, 3, 4, 8), row, strict=True)]
        for name, row in costs.items()
    }
    smallest = sum(stored_bits(_spec(2)) for _ in layers)
    step = 64 * 8  # one bit more for a layer
    for more, want in [(0, "222"), (1, "322"), (2, "422"), (3, "342"), (4, "442"), (5, "443")]:
        chosen = allocate(layers, smallest + more * step)
        assert "".join(str(c.spec.bits) for c in chosen.values()) == want
        best = min(
            sum(c.divergence for c in combination)
            for combination in itertools.product(*layers.values())
            if sum(c.size for c in combination) <= smallest + more * step
        )
        assert sum(c.divergence for c in chosen.values()) == best
    assert allocate(layers, 0)["a"].spec.bits == 2


def test_sizes_count_scales_and_offsets():
    assert stored_bits(_spec(3)) == 8 * (3 * 64 + 4 * 32)
    assert stored_bits(replace(_spec(3), in_features=65)) == 8 * (3 * 65 + 5 * 32)
    wide = QuantSpec(3, 16, 64, 8, offsets_dtype=torch.float32)
    assert stored_bits(wide) == 8 * (3 * 64 + 4 * 48)


def test_the_measure_predicts_the_divergence_of_one_layer(source, monkeypatch):
    """Rounding one layer alone changes the model's distributions as much as was predicted."""
    monkeypatch.setattr(allocating, "_GRADIENT_WINDOWS", 64)
    options = QuantizeOptions(calibration=(), target_bits=3.0, **{**COMMON, "progress": False})
    model = ModelSource(source, dtype=torch.float32)
    specs = choose_layers(model, options.config())
    windows = token_ids(64, 16)
    chooser = BitChooser(model, specs, options, windows)
    measured = dict(chooser._measure(set()))
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ratios = []
    for name in specs:
        candidate = measured[name][1]  # 3 bits
        changed = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        linear = changed.get_submodule(name)
        caught = []
        with torch.no_grad():
            handle = linear.register_forward_hook(lambda m, a, y, c=caught: c.append(a[0]))
            changed(input_ids=windows)
            handle.remove()
            x = caught[0].reshape(-1, linear.in_features)
            hessian = x.t() @ x / len(x)
            monkeypatch.setattr(allocating, "_OUTPUTS", 1 << 20)
            quantized = allocating.gptq(
                linear.weight,
                hessian,
                candidate.spec,
                settings=replace(options.solver, sweeps=0),
            )
            linear.weight.copy_(quantized.dequantize().t())
            ratios.append(candidate.divergence / divergence(changed, original, windows).item())
    assert len(ratios) == 14
    assert 0.5 < sorted(ratios)[7] < 2
    assert all(0.25 < ratio < 4 for ratio in ratios), ratios


def test_what_is_written_keeps_to_the_target(source, tmp_path):
    sizes = {}
    for target in (2.5, 3.0):
        result = _run(source, tmp_path / str(target), target_bits=target)
        checkpoint = open_quantized(result.out)
        found = {name: spec.bits for name, spec in checkpoint.layers.items()}
        assert {name: layer["bits"] for name, layer in result.layers.items()} == found
        assert len(set(found.values())) > 1
        uniform = [stored_bits(replace(spec, bits=2)) for spec in checkpoint.layers.values()]
        weights = sum(s.in_features * s.out_features for s in checkpoint.layers.values())
        sizes[target] = sum(map(stored_bits, checkpoint.layers.values()))
        assert sizes[target] <= sum(uniform) + (target - 2) * weights
        record = checkpoint.config.base["chosen_bits"]
        assert record["stored_bits_a_weight"] == pytest.approx(sizes[target] / weights, abs=1e-4)
        assert not list(result.out.glob("*bits*"))
        again = transformers.AutoModelForCausalLM.from_pretrained(result.out)
        assert again(input_ids=token_ids()).logits.isfinite().all()
    assert sizes[2.5] < sizes[3.0]


def test_overrides_with_bits_keep_their_grid(source, tmp_path):
    dynamic = {"*.v_proj": {"bits": 8}, "*.o_proj": {"group_size": 8}}
    result = _run(source, tmp_path / "out", target_bits=3.0, dynamic=dynamic)
    layers = open_quantized(result.out).layers
    values = [spec for name, spec in layers.items() if "v_proj" in name]
    assert [spec.bits for spec in values] == [8, 8]
    assert {s.group_size for name, s in layers.items() if "o_proj" in name} == {8}
    assert {s.group_size for name, s in layers.items() if "o_proj" not in name} == {16}


def test_a_target_that_fixed_layers_leave_no_room_for_is_refused(source, tmp_path):
    fixed = {"dynamic": {"mlp": {"bits": 8}}}
    with pytest.raises(ConfigError, match=r"expected \d\.\d\d or more, found 2\.2"):
        _run(source, tmp_path / "out", target_bits=2.2, **fixed)
    assert not list(tmp_path.iterdir())
    specs = {"a": _spec(8), "b": _spec(3)}
    allocating.check_target(specs, {"a"}, 5.0)
    with pytest.raises(ConfigError, match=r"expected 5\.00 or more, found 4\.99"):
        allocating.check_target(specs, {"a"}, 4.99)


def test_an_interrupted_run_does_not_measure_again(source, tmp_path, monkeypatch):
    whole = _run(source, tmp_path / "whole", target_bits=2.5).out

    class StopError(Exception):
        pass

    with monkeypatch.context() as patch:
        patch.setattr("qalora_plugin.quantize.walk.Walk.solve", _raise(StopError))
        with pytest.raises(StopError):
            _run(source, tmp_path / "out", target_bits=2.5)
    monkeypatch.setattr(BitChooser, "choose", _raise(AssertionError))
    out = _run(source, tmp_path / "out", target_bits=2.5).out
    files = [{p.name: p.read_bytes() for p in path.iterdir()} for path in (whole, out)]
    assert files[0] == files[1]


def _raise(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_minima_for_llama_cpp_have_four_bits_at_most(source, tmp_path):
    result = _run(source, tmp_path / "out", target_bits=3.9, offsets_at="minimum")
    assert max(layer["bits"] for layer in result.layers.values()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "bits 'auto' and target_bits go together"),
        ({"bits": 3, "target_bits": 3.0}, "bits 'auto' and target_bits go together"),
        ({"target_bits": 1.5}, "target_bits must lie between 2 and 8, found 1.5"),
        ({"target_bits": 3.0, "format": "gptq"}, "format 'gptq' has one grid for all layers"),
        (
            {"target_bits": 3.0, "method": "rtn", "calibration": None},
            "bits 'auto' needs calibration data .* use method 'gptq'",
        ),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ConfigError, match=message):
        QuantizeOptions(**{"bits": "auto", "calibration": (), **settings})


def test_the_command_line(text_model_dir, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(100)]
    text.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["quantize", str(text_model_dir), "--out", str(tmp_path / "out"), "--bits", "auto"]
    arguments += ["--calibration", str(text), "--samples", "2", "--seq-len", "32"]
    assert main(arguments) == 1
    assert "--bits auto and --target-bits go together" in capsys.readouterr().err
    refine = ["--refine", "--refine-steps", "3", "--refine-rate", "0.001"]
    assert main([*arguments, "--target-bits", "3", *refine]) == 0
    printed = capsys.readouterr().out
    assert "layers in 2 bits" in printed and "held-out KL from the 16-bit model" in printed
