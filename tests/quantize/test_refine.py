"""Scales and offsets trained against the 16-bit model: what is trained is what is written."""

import json
import logging

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support.architectures import save, token_ids

from qalora_kernels import PackedWeight, QuantSpec
from qalora_plugin import QALoRAConfig, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import AdapterError, ConfigError, QuantizationError
from qalora_plugin.files.manifest import check_manifest
from qalora_plugin.quantize import refine
from qalora_plugin.quantize.divergence import _Divergence, divergence
from qalora_plugin.quantize.pipeline import quantize_model
from qalora_plugin.quantize.shards import BlockShards
from qalora_plugin.quantize.trained_grid import TrainedGrid

COMMON = {"bits": 2, "group_size": 16, "seq_len": 16, "samples": 8, "progress": False}
REFINE = {"refine": True, "refine_steps": 12, "refine_rate": 0.01, "refine_batch": 4}


def _run(source, out, **settings):
    calibration = token_ids(40, 16)
    return quantize_model(source, out, **{"calibration": calibration, **COMMON, **settings})


def _load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def _files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save("qwen2", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    return _run(source, tmp_path_factory.mktemp("plain") / "out").out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refine_norms": True, "desc_act": True},
        {"zero_points": "integer"},
        {"zero_points": "none"},
        {"offsets_at": "minimum"},
    ],
)
def test_the_result_is_what_was_trained(settings, source, tmp_path, monkeypatch):
    trained = []
    original = refine.Refiner.packed
    monkeypatch.setattr(
        refine.Refiner, "packed", lambda self: trained.append(self) or original(self)
    )
    out = _run(source, tmp_path / "out", **REFINE, **settings).out
    ids = token_ids(3, 16)
    with torch.no_grad():
        want = trained[0]._student(input_ids=ids).logits
        assert torch.equal(_load(out)(input_ids=ids).logits, want)
    model, held = trained[0]._teacher, trained[0].held_bytes
    weights = sum(parameter.nbytes for parameter in model.parameters())
    grid = sum(layer.scales.numel() for layer in trained[0].layers.values())
    assert weights + 16 * grid < held < 2 * weights + 40 * grid
    record = json.loads((out / "config.json").read_text())["quantization_config"]["base"]["refined"]
    assert (record["steps"], record["norms"]) == (12, "refine_norms" in settings)
    held = token_ids(40, 16)[-8:]  # of 12 * 4 + 8 windows that refining asks for there are 40
    with torch.no_grad():
        found = divergence(_load(out), _load(source), held).item()
    assert record["heldout_kl_after"] == pytest.approx(found, rel=1e-4)
    assert found < record["heldout_kl_before"]
    assert check_manifest(out)
    assert not [name for name in _files(out) if "state" in name or "part" in name]


def test_a_model_that_it_made_worse_is_told_of(source, tmp_path, caplog):
    _run(source, tmp_path / "better", **REFINE)
    assert "further" not in caplog.text
    _run(source, tmp_path / "worse", **{**REFINE, "refine_rate": 0.9})
    assert "refining took the model further from the 16-bit one" in caplog.text
    assert "Lower refine_rate (now 0.9)" in caplog.text


def test_integers_and_everything_else_stay(source, plain, tmp_path):
    refined = _run(source, tmp_path / "out", **REFINE).out
    before, after = open_quantized(plain), open_quantized(refined)
    changed = {name for name in after.reader.tensors if not _same(before, after, name)}
    layers = after.layers
    # GPTQ saw the same windows: of the 40 the first 8, held out are the last 8
    assert changed == {f"{n}.{part}" for n in layers for part in ("scales", "offsets")}
    assert after.config.base["fingerprint"] == before.config.base["fingerprint"]


def _same(before, after, name):
    return torch.equal(before.reader.get(name), after.reader.get(name))


def test_integer_zero_points_stay_integers(source, tmp_path):
    out = _run(source, tmp_path / "out", zero_points="integer", **REFINE).out
    checkpoint = open_quantized(out)
    for name, spec in checkpoint.layers.items():
        layer = checkpoint.layer(name)
        zeros = spec.mid - layer.offsets.double() / layer.scales.double()
        assert torch.equal(zeros, zeros.round())


def test_norms_are_trained_when_asked(source, plain, tmp_path):
    refined = open_quantized(_run(source, tmp_path / "out", refine_norms=True, **REFINE).out)
    before = open_quantized(plain)
    norms = [name for name in refined.reader.tensors if "norm" in name]
    assert len(norms) == 5 and not any(_same(before, refined, name) for name in norms)
    assert refined.reader.plan(norms) == before.reader.plan(norms)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("step", [5, 12])
def test_an_interrupted_run_ends_in_the_same_bytes(step, source, tmp_path, monkeypatch):
    """Killed while training, and while the trained numbers are written."""
    settings = {**REFINE, "refine_norms": True}
    whole = _run(source, tmp_path / "whole", **settings).out
    with monkeypatch.context() as patch:
        patch.setattr(refine, "_SAVE_SECONDS", 0.0)
        if step == 5:
            original = refine.Refiner._train_step

            def dying(self, optimizer, ids):
                if self._step == step:
                    raise _StopError
                return original(self, optimizer, ids)

            patch.setattr(refine.Refiner, "_train_step", dying)
        else:
            rewrite = BlockShards.rewrite

            def dying(self, layers, dense):
                rewrite(self, [next(iter(layers))], {})
                raise _StopError

            patch.setattr(BlockShards, "rewrite", dying)
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out", **settings)
    taken = []
    original_step = refine.Refiner._train_step
    monkeypatch.setattr(
        refine.Refiner, "_train_step", lambda self, *a: taken.append(1) or original_step(self, *a)
    )
    out = _run(source, tmp_path / "out", **settings).out
    assert len(taken) == 12 - step
    assert _files(out) == _files(whole)
    assert not list(tmp_path.glob(".*"))


def test_other_settings_start_over(source, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(refine.Refiner, "run", lambda *_, **__: (_ for _ in ()).throw(_StopError))
        with pytest.raises(_StopError):
            _run(source, tmp_path / "out", **REFINE)
    with caplog.at_level(logging.WARNING):
        assert _run(source, tmp_path / "out", **{**REFINE, "refine_rate": 0.02}).resumed == 0
    assert "starting over" in caplog.text


def test_text_that_is_too_short_or_a_model_without_a_head(source, tmp_path):
    with pytest.raises(QuantizationError, match="expected 4 windows or more, found 3"):
        _run(source, tmp_path / "out", calibration=token_ids(3, 16), **REFINE)
    encoder = save("t5_encoder", tmp_path / "encoder")
    with pytest.raises(ConfigError, match="no output embeddings"):
        _run(encoder, tmp_path / "out", **REFINE)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder"}


def test_a_start_is_the_weight_itself_and_gradients_pass_straight_through():
    generator = torch.Generator().manual_seed(0)
    spec = QuantSpec(3, 16, 40, 5)
    codes = torch.randint(0, 8, (5, 40), generator=generator)
    scales = (torch.rand(3, 5, generator=generator) + 0.1).half().float()
    offsets = torch.randn(3, 5, generator=generator).half().float()
    layer = TrainedGrid.from_packed(PackedWeight.from_codes(codes, scales, offsets, None, spec))
    layer.start("real")
    assert all(torch.equal(a, b) for a, b in zip(layer.grid(), (scales, offsets), strict=True))
    x = torch.randn(7, 40, generator=generator)
    dy = torch.randn(7, 5, generator=generator)
    layer(x).backward(dy)
    group = torch.arange(40) // 16
    exact = [torch.zeros(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    s = scales.double() * (1 + exact[0])
    o = offsets.double() + scales.double() * exact[1]
    weight = s[group] * (codes.t().double() - 4) + o[group]
    (x.double() @ weight).backward(dy.double())
    for parameter, truth in zip((layer.stretch, layer.shift), exact, strict=True):
        torch.testing.assert_close(parameter.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)


def test_the_divergence_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(700, 11, generator=generator)
    student = torch.randn(700, 11, generator=generator).requires_grad_()
    loss = _Divergence.apply(student, teacher)
    exact = student.detach().double().requires_grad_()
    target = teacher.double().log_softmax(-1)
    want = torch.nn.functional.kl_div(
        exact.log_softmax(-1), target, reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(loss.double(), want)
    (3 * loss).backward()
    (3 * want).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-9)


def test_an_adapter_belongs_to_the_base_that_it_was_trained_on(source, plain, tmp_path):
    """The integers of both are the same: their fingerprints do not tell them apart."""
    refined = _run(source, tmp_path / "refined", **REFINE).out
    model = get_peft_model(_load(refined), QALoRAConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=refined)
    with pytest.raises(AdapterError, match=r"base_refined is .*'steps': 12.* is None"):
        merge_adapter(tmp_path / "adapter", tmp_path / "wrong", base=plain)
    PeftModel.from_pretrained(_load(refined), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="base_refined"):
        PeftModel.from_pretrained(_load(plain), tmp_path / "adapter")
