"""`verify_merge` finds what is wrong, whatever it is, and says how far its proof goes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import FIXTURES, edit_json, edit_tensors
from support.directories import unbound
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from qalora_plugin import merge_adapter, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.cli import main
from qalora_plugin.errors import CheckpointError, VerificationError
from qalora_plugin.merge.adapter import open_adapter
from qalora_plugin.verify.logits import logits_of, random_ids

Make = Callable[..., Path]
LAYER = "model.layers.1.mlp.down_proj"
STOCK = "gptq_4bit_g32_asym"


@pytest.fixture
def adapter_dir(base_dir, make_adapter):
    return make_adapter(base_dir, layers=lambda name: "gate_proj" not in name)


@pytest.fixture
def merged_dir(adapter_dir, tmp_path):
    """A merged checkpoint without a manifest, so that tests can tamper with it."""
    out = merge_adapter(adapter_dir, tmp_path / "merged").out
    (out / "qalora_manifest.json").unlink()
    return out


@pytest.mark.parametrize("adapt", ["zeros", "scales", "both"])
def test_a_good_merge(adapt, base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, layers=lambda name: "gate_proj" not in name, adapt=adapt)
    merge_adapter(adapter, tmp_path / "merged")
    report = verify_merge(tmp_path / "merged", adapter, logits=True)
    assert (report.layers, report.unadapted_layers) == (12, 2)
    assert report.max_difference == 0.0 and report.integers_equal and report.hashes
    assert report.output_error <= 1 < report.output_change
    assert (report.convention, report.convention_from) == ("sum", "adapter config")
    assert report.logits is not None
    assert report.logits.equal and report.logits.difference == 0.0 < report.logits.effect
    assert "equal to the bit" in report.as_text()
    assert json.loads(json.dumps(report.as_dict()))["logits"]["equal"] is True


def _flip(name):
    def change(tensors):
        flat = tensors[name].view(-1).view(torch.int16)
        flat[5] ^= 1

    return change


TAMPERED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "an integer": (_flip(f"{LAYER}.qweight"), rf"{LAYER}\.qweight differs from the base's"),
    "an offset": (_flip(f"{LAYER}.offsets"), rf"{LAYER}\.offsets is not what .* 1 of"),
    "a scale": (_flip(f"{LAYER}.scales"), rf"{LAYER}\.scales is not what"),
    "an unadapted offset": (
        _flip("model.layers.0.mlp.gate_proj.offsets"),
        r"gate_proj\.offsets is not what",
    ),
    "a norm": (_flip("model.norm.weight"), r"model\.norm\.weight differs from the base's"),
    "a lost tensor": (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
    "a new tensor": (lambda t: t.update(x=torch.ones(1)), "tensor x is not one that base"),
    "a dtype": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float()}),
        r"lm_head\.weight: expected .*bfloat16",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_tampered_tensors(what, merged_dir, adapter_dir):
    change, message = TAMPERED[what]
    edit_tensors(merged_dir / "model.safetensors", change)
    with pytest.raises(VerificationError, match=message):
        verify_merge(merged_dir, adapter_dir)


def test_hashes(adapter_dir, tmp_path):
    out = merge_adapter(adapter_dir, tmp_path / "merged").out
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"qalora_manifest\.json says"):
        verify_merge(out, adapter_dir)


def test_a_base_is_not_merged(base_dir, adapter_dir):
    with pytest.raises(VerificationError, match="says nothing of a merge"):
        verify_merge(base_dir, adapter_dir, base_dir)


def test_other_groups_of_the_same_number(merged_dir, adapter_dir):
    """Groups of 40 in 64 inputs are two, as those of 32; no adapter is on the layer."""
    config = json.loads((unbound(merged_dir) / "config.json").read_text())
    grid = {"model.layers.0.mlp.gate_proj": {"group_size": 40}}
    config["quantization_config"]["dynamic"] = grid
    (merged_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"group_size of .*expected 32 .*found 40"):
        verify_merge(merged_dir, adapter_dir)


def test_several_adapters_that_were_merged_at_once(merged_dir, adapter_dir):
    config = json.loads((unbound(merged_dir) / "config.json").read_text())
    record = config["quantization_config"]["merged"]
    both = {"adapter": "a, b", "peft_type": "QALORA", "adapters": [record, record]}
    config["quantization_config"]["merged"] = both  # as merge_and_unload writes it
    (merged_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"2 adapters were merged .*\(a, b\)"):
        verify_merge(merged_dir, adapter_dir)


def test_another_adapter(merged_dir, base_dir, adapter_dir, tmp_path):
    other = shutil.copytree(adapter_dir, tmp_path / "other")
    edit_tensors(other, lambda t: t.update({key: 1.01 * value for key, value in t.items()}))
    with pytest.raises(VerificationError, match=r"merged from another adapter"):
        verify_merge(merged_dir, other, base_dir)


@pytest.mark.parametrize("act_order", [False, True])
def test_peft_adapter_on_a_stock_base(act_order, make_foreign, tmp_path):
    # with act-order only pools that hold whole groups merge: here one pool of all 256 inputs
    base = FIXTURES / ("gptq_4bit_g128_actorder_asym" if act_order else STOCK)
    inputs = next(iter(open_quantized(base).layers.values())).in_features
    adapter = make_foreign(base, inputs if act_order else 32, use_qalora=True)
    merge_adapter(adapter, tmp_path / "merged")
    report = verify_merge(tmp_path / "merged", adapter, logits=True)
    assert (report.convention, report.convention_from) == ("peft", "adapter config")
    assert report.output_error <= 1 < report.output_change
    assert report.logits is not None
    assert report.logits.difference < 1e-3 * report.logits.effect


@pytest.mark.parametrize("wrong", ["mean", "sum"])
def test_wrongly_declared_convention_is_caught_by_the_adapters_config(
    wrong, make_foreign, tmp_path
):
    base = FIXTURES / STOCK
    adapter = make_foreign(base, 32, use_qalora=True)
    stripped = shutil.copytree(adapter, tmp_path / "stripped")
    edit_json(stripped, use_qalora=None, qalora_group_size=None)
    out = merge_adapter(stripped, tmp_path / "merged", convention=wrong).out
    with pytest.raises(VerificationError, match=f"'{wrong}', but .* trained with 'peft'"):
        verify_merge(out, adapter)
    # and if the label is forged as well, the numbers give it away
    config = json.loads((unbound(out) / "config.json").read_text())
    config["quantization_config"]["merged"]["convention"] = "peft"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="offsets is not what base and adapter give"):
        verify_merge(out, adapter)


def _authors_logits(base, adapter, ids, group):
    """Logits as the QA-LoRA authors' code gives them: an AvgPool1d in front of lora_A."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    opened = open_adapter(adapter)
    pool = nn.AvgPool1d(group)
    for name, layer in opened.layers.items():
        a, b = opened.get_pair(layer.keys["zeros"])

        def add(
            module,
            args,
            y,
            a=a,
            b=b,
            scaling=layer.scaling,
        ):
            return y + pool(args[0]) @ a.t() @ b.t() * scaling

        model.get_submodule(name).register_forward_hook(add)
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_reference_logits_prove_the_convention_that_the_config_does_not_state(
    make_foreign, tmp_path
):
    base = FIXTURES / STOCK
    adapter = make_foreign(base, 32, use_qalora=False)
    edit_tensors(adapter, lambda t: t.update({k: v * 8 for k, v in t.items() if "lora_B" in k}))
    ids = torch.arange(12)[None]
    reference = tmp_path / "reference.safetensors"
    logits = _authors_logits(base, adapter, ids, 32)
    save_file({"input_ids": ids, "logits": logits}, reference)

    right = merge_adapter(adapter, tmp_path / "right", convention="mean").out
    wrong = merge_adapter(adapter, tmp_path / "wrong", convention="peft").out
    # without evidence both are what they declare to be, and the report says so
    for out in (right, wrong):
        report = verify_merge(out, adapter)
        assert report.convention_from == "declaration"
        assert "NOT PROVEN" in report.as_text()
    assert verify_merge(right, adapter, reference=reference).convention_from == "reference"
    with pytest.raises(VerificationError, match=r"convention 'mean', but .* merged with 'peft'"):
        verify_merge(wrong, adapter, reference=reference)
    save_file({"input_ids": ids, "logits": torch.randn_like(logits)}, reference)
    with pytest.raises(VerificationError, match="under any convention"):
        verify_merge(right, adapter, reference=reference)
    save_file({"ids": ids}, reference)
    with pytest.raises(VerificationError, match="expected tensors input_ids"):
        verify_merge(right, adapter, reference=reference)


IDS = torch.arange(8)[None]
REFERENCES = {
    "one sample without a batch": (
        IDS[0],
        torch.zeros(8, 64),
        r"found input_ids torch.int64 \[8\]",
    ),
    "ids of floats": (IDS.float(), torch.zeros(1, 8, 64), "input_ids torch.float32"),
    "another tokenizer": (IDS + 57, torch.zeros(1, 8, 64), "expected 0 to 63, .* found 57 to 64"),
    "another model": (IDS, torch.zeros(1, 8, 70), r"\[1, 8, 64\] .* found \[1, 8, 70\]"),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_references_that_do_not_belong_to_the_model(case, merged_dir, adapter_dir, tmp_path):
    ids, logits, message = REFERENCES[case]
    save_file({"input_ids": ids, "logits": logits}, tmp_path / "reference.safetensors")
    with pytest.raises(VerificationError, match=rf"reference\.safetensors: .*{message}"):
        verify_merge(merged_dir, adapter_dir, reference=tmp_path / "reference.safetensors")


def test_logits_of_a_decoder_behind_an_encoder():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=48, **sizes)).eval()
    assert logits_of(model, IDS).shape == (1, 8, 48)


def test_logits_of_a_model_that_reads_no_tokens():
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=1, image_size=16, patch_size=16))
    with pytest.raises(VerificationError, match=r"ViTForImageClassification: .*--logits"):
        random_ids(model, 1, 8)


def test_command_line(base_dir, make_adapter, tmp_path, capsys):
    adapter, out = make_adapter(base_dir), tmp_path / "merged"
    assert main(["merge", str(adapter), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 14
    arguments = ["verify", str(out), "--adapter", str(adapter), "--base", str(base_dir)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_difference"] == 0.0
    assert main([*arguments, "--logits"]) == 0
    assert "equal to the bit" in capsys.readouterr().out
    assert main(["merge", str(adapter), "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["verify", str(base_dir), "--adapter", str(adapter)]) == 1
    assert "says nothing of a merge" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["use_qalora_adapter", "use_qalora_adapter_g16"])
def test_adapter_that_pefts_own_code_trained(name, tmp_path):
    # `reference` holds the logits that PEFT gave, on the same base, where it was trained
    base, adapter = FIXTURES / "gptq_4bit_g32_sym", FIXTURES / name
    reference = adapter / "reference.safetensors"
    merge_adapter(adapter, tmp_path / "merged", base)
    report = verify_merge(tmp_path / "merged", adapter, base, logits=True, reference=reference)
    assert report.convention == "peft" and report.logits is not None
    assert report.logits.difference < 1e-4 * report.logits.effect
    silent = shutil.copytree(adapter, tmp_path / "silent")
    edit_json(silent, use_qalora=None)
    merge_adapter(silent, tmp_path / "wrong", base, convention="mean")
    with pytest.raises(VerificationError, match=r"convention 'peft', but .* merged with 'mean'"):
        verify_merge(tmp_path / "wrong", silent, base, reference=reference)
