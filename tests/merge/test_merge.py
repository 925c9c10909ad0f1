"""Merging on files: what changes, what stays, what is refused, and what a kill leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.adapters import FIXTURES, PREFIX, edit_json, edit_tensors
from support.models import llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)

from qalora_plugin import QALoRAConfig, export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import AdapterError, CheckpointError, OutputError
from qalora_plugin.files.digests import SHA256, file_digest
from qalora_plugin.files.manifest import check_manifest
from qalora_plugin.files.reader import CheckpointReader
from qalora_plugin.merge.adapter import open_adapter
from qalora_plugin.verify.merge import verify_merge

Make = Callable[..., Path]
ATTENTION = "self_attn"


def _bytes(directory, name):
    return b"".join(bytes(piece) for piece in CheckpointReader(directory).chunks(name))


@pytest.fixture(scope="session")
def bf16_grid_dir(quantize):
    """A base whose scales and minima are bf16 numbers, as in most of MLX's files."""
    return quantize(llama(), torch.bfloat16, group_size=32, offsets_at="minimum")


@pytest.mark.parametrize("grid", ["base_dir", "bf16_grid_dir"])
@pytest.mark.parametrize("adapt", ["zeros", "scales", "both"])
def test_equals_peft_merge_and_unload(adapt, grid, request, make_adapter, tmp_path):
    base_dir = request.getfixturevalue(grid)
    adapter = make_adapter(base_dir, adapt=adapt)
    merge_adapter(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(
        tmp_path / "unloaded"
    )
    ours, theirs = CheckpointReader(tmp_path / "merged"), CheckpointReader(tmp_path / "unloaded")
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name in ours.tensors:
        assert ours.get(name).dtype == theirs.get(name).dtype
        assert torch.equal(ours.get(name), theirs.get(name)), name
    report = verify_merge(tmp_path / "merged", adapter, base_dir)
    assert report.output_error <= 1 < report.output_change


def test_only_scales_and_offsets_change(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, layers=lambda name: ATTENTION in name)
    result = merge_adapter(adapter, tmp_path / "merged")
    assert result.layers == 8 and result.convention == "sum"
    changed = {
        name
        for name in CheckpointReader(base_dir).tensors
        if _bytes(base_dir, name) != _bytes(result.out, name)
    }
    assert changed == {f"{layer}.offsets" for layer in open_adapter(adapter).layers}


def test_unadapted_layers_are_copied(bf16_grid_dir, make_adapter, tmp_path):
    """Read and packed again, a minimum that is tiny beside its scale would become 0."""
    base = shutil.copytree(bf16_grid_dir, tmp_path / "base")
    name = "model.layers.0.mlp.gate_proj"
    edit_tensors(base / "model.safetensors", lambda t: t[f"{name}.scales"].fill_(1))
    edit_tensors(base / "model.safetensors", lambda t: t[f"{name}.offsets"].fill_(6e-8))
    adapter = make_adapter(base, layers=lambda layer: layer != name)
    out = merge_adapter(adapter, tmp_path / "merged").out
    for part in ("scales", "offsets"):
        assert _bytes(base, f"{name}.{part}") == _bytes(out, f"{name}.{part}")
    assert verify_merge(out, adapter).unadapted_layers == 1
    # in memory they are packed again, which is no other number there
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    model.merge_and_unload().save_pretrained(tmp_path / "unloaded")
    assert verify_merge(tmp_path / "unloaded", adapter).unadapted_layers == 1


def test_result_is_a_model_directory(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir)
    (adapter / "tokenizer_config.json").write_text('{"from": "training"}')
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tool_use.jinja").write_text("training's")
    out = merge_adapter(adapter, tmp_path / "deep" / "merged").out
    templates = out / "additional_chat_templates"
    assert (templates / "tool_use.jinja").read_text() == "training's"
    assert not (templates / "rag.jinja").exists()  # the base's: the training had none of it
    assert check_manifest(out)
    assert (out / "LICENSE").read_text() == "a licence"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "training"}
    assert (out / "generation_config.json").exists()
    merged = json.loads((out / "config.json").read_text())["quantization_config"]["merged"]
    assert merged["convention"] == "sum" and merged["adapt"] == "zeros"
    assert (merged["r"], merged["lora_alpha"], merged["layers"]) == (4, 6, 14)
    assert merged["adapter_sha256"] == file_digest(adapter / "adapter_model.safetensors", SHA256)
    assert not adapter.with_name(".merged").exists()


def test_act_order_stock_base(make_adapter, tmp_path):
    base = FIXTURES / "gptq_4bit_g128_actorder_asym"
    out = merge_adapter(make_adapter(base), tmp_path / "merged").out
    stock, merged = open_quantized(base), open_quantized(out)
    assert not merged.is_foreign and merged.config.offsets_dtype == "float32"
    for name in stock.layers:
        assert _bytes(base, f"{name}.qweight") == _bytes(out, f"{name}.qweight")
        assert _bytes(base, f"{name}.g_idx") == _bytes(out, f"{name}.g_idx")
        assert torch.equal(merged.layer(name).scales, stock.layer(name).scales)
        assert not torch.equal(merged.layer(name).offsets, stock.layer(name).offsets)


@pytest.mark.parametrize("pool", [16, 64])
def test_pooling_groups_that_differ_from_the_bases(pool, make_foreign, tmp_path):
    base = FIXTURES / "gptq_4bit_g32_asym"
    out = merge_adapter(make_foreign(base, pool, use_qalora=True), tmp_path / "merged").out
    config = open_quantized(out).config
    assert config.group_size == min(pool, 32)
    assert config.merged is not None and config.merged["convention"] == "peft"
    model = AutoModelForCausalLM.from_pretrained(out)  # the format's own reader agrees
    assert model(torch.arange(8)[None]).logits.isfinite().all()
    assert verify_merge(out, tmp_path / "foreign", base).output_error <= 1


def test_act_order_of_compressed_tensors(make_foreign, tmp_path):
    base = tmp_path / "base"  # of groups in reverse order, each within a pool
    shutil.copytree(FIXTURES / "ct_4bit_g32_asym", base)

    def reverse(tensors):
        for name, spec in open_quantized(base).layers.items():
            groups = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
            tensors[f"{name}.weight_g_idx"] = groups.flip(0)

    edit_tensors(base / "model.safetensors", reverse)
    adapter = make_foreign(base, 32, use_qalora=True)
    out = merge_adapter(adapter, tmp_path / "merged").out
    layers = open_quantized(base).layers
    assert verify_merge(out, adapter).layers == len(layers)
    assert export_model(adapter, tmp_path / "lora", "lora").layers == len(layers)


def test_split_groups_only_where_adapted(make_foreign, tmp_path):
    adapter = make_foreign(FIXTURES / "gptq_4bit_g32_asym", 16, use_qalora=True)
    edit_tensors(adapter, lambda t: [t.pop(key) for key in list(t) if ATTENTION not in key])
    edit_json(adapter, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    out = merge_adapter(adapter, tmp_path / "merged").out
    sizes = {name: spec.group_size for name, spec in open_quantized(out).layers.items()}
    assert {sizes[n] for n in sizes if ATTENTION in n} == {16}
    assert {sizes[n] for n in sizes if ATTENTION not in n} == {32}
    AutoModelForCausalLM.from_pretrained(out)


def test_modules_to_save_replaces_whole_tensors(base_dir, make_adapter, tmp_path):
    head = torch.randn(64, 64)
    adapter = make_adapter(
        base_dir, modules_to_save=["lm_head"], extra={f"{PREFIX}lm_head.weight": head}
    )
    result = merge_adapter(adapter, tmp_path / "merged")
    assert result.replaced == ["lm_head.weight"]
    assert torch.equal(CheckpointReader(result.out).get("lm_head.weight"), head)
    assert verify_merge(result.out, adapter).modules_to_save == 1


def test_trained_head_of_a_tied_base_is_untied(tied_base_dir, make_adapter, tmp_path):
    head = torch.randn(64, 64)
    adapter = make_adapter(
        tied_base_dir, modules_to_save=["lm_head"], extra={f"{PREFIX}lm_head.weight": head}
    )
    merge_adapter(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"bits": 3}, "bits is 3, that of .* is 4"),
    "group size": ({"group_size": 64}, "group_size is 64, that of .* is 32"),
    "fingerprint": ({"fingerprint": "0" * 32}, "fingerprint is 0{32}, that of"),
    "trained on a merged base": (
        {"base_merged": {"adapter": "first"}},
        "nothing is merged into it already, the adapter was trained on a base with 'first' merged",
    ),
    "trained on a refined base": (
        {"base_refined": {"steps": 3}},
        "base_refined is {'steps': 3}, that of .* is None",
    ),
    "a missing layer": (
        {"layers": lambda name: "1.mlp.up_proj" not in name, "target_modules": ["up_proj"]},
        r"missing keys: none for .*\.1\.mlp\.up_proj",
    ),
    "a layer that the base has not": (
        {
            "extra": {
                f"{PREFIX}model.layers.9.q_proj.qalora_A.weight": torch.ones(4, 2),
                f"{PREFIX}model.layers.9.q_proj.qalora_B.weight": torch.ones(64, 4),
            }
        },
        r"model.layers.9.q_proj, which is not a quantized",
    ),
    "no base": ({"base_model_name_or_path": None}, "Name the quantized base with --base"),
    "an integer layer in modules_to_save": (
        {
            "layers": lambda name: "up_proj" not in name,
            "modules_to_save": ["up_proj"],
            "extra": {f"{PREFIX}model.layers.0.mlp.up_proj.weight": torch.ones(172, 64)},
        },
        r"up_proj\.weight: modules_to_save names a layer",
    ),
    "one of two resized embeddings": (
        {"modules_to_save": ["lm_head"], "extra": {f"{PREFIX}lm_head.weight": torch.ones(70, 64)}},
        r"lm_head.weight: shape \[70, 64\]",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    case, base_dir, make_adapter, tmp_path
):
    config, message = REFUSALS[case]
    adapter = make_adapter(base_dir, **config)
    with pytest.raises(AdapterError, match=message):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert not (tmp_path / "out").exists()


def test_wrong_width_is_refused(base_dir, make_adapter, tmp_path):
    key = f"{PREFIX}model.layers.0.self_attn.q_proj.qalora_"
    for changed, message in (
        ({f"{key}A.weight": torch.ones(4, 3)}, "A has 3 columns, the base's layer 2 groups"),
        ({f"{key}B.weight": torch.ones(65, 4)}, "B has 65 rows, the base's layer 64 outputs"),
    ):
        adapter = make_adapter(base_dir, name=message[0], extra=changed)
        with pytest.raises(AdapterError, match=message):
            merge_adapter(adapter, tmp_path / "merged")


def test_merging_twice_is_refused(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir)
    merge_adapter(adapter, tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"'\w+' is merged into it already, .* with nothing"):
        merge_adapter(adapter, tmp_path / "again", tmp_path / "merged")
    assert not (tmp_path / "again").exists()


def test_adapter_trained_on_a_merged_base_merges_into_it(base_dir, make_adapter, tmp_path):
    first = merge_adapter(make_adapter(base_dir), tmp_path / "first").out
    before = open_quantized(first).config.merged
    second = merge_adapter(make_adapter(first, name="b", base_merged=before), tmp_path / "second")
    after = open_quantized(second.out).config.merged
    assert after is not None and after["base_merged"] == before


def test_non_empty_output_is_refused(base_dir, make_adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("x")
    with pytest.raises(OutputError, match="is not empty"):
        merge_adapter(make_adapter(base_dir), tmp_path / "merged")
    assert [p.name for p in (tmp_path / "merged").iterdir()] == ["precious"]


def test_16_bit_base_is_refused_with_the_way_out(base_dir, dense_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, bits=4, group_size=32)
    message = r"--method rtn --bits 4 --group-size 32"
    with pytest.raises(AdapterError, match=message):
        merge_adapter(adapter, tmp_path / "merged", dense_dir)


def test_16_bit_base_of_a_foreign_adapter_is_refused(base_dir, dense_dir, make_foreign, tmp_path):
    adapter = make_foreign(base_dir, 4, use_qalora=True)
    with pytest.raises(CheckpointError, match="a model that is not quantized"):
        merge_adapter(adapter, tmp_path / "merged", dense_dir)


def test_overflowing_change_is_refused_and_leaves_nothing(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir)
    edit_tensors(adapter, lambda t: t.update({key: 1e4 * value for key, value in t.items()}))
    with pytest.raises(AdapterError, match="folded in, offsets: expected finite numbers"):
        merge_adapter(adapter, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


_KILLED_MERGE = """
import sys, time
from qalora_plugin import QALoRAConfig, merge_adapter
def progress(done, total):
    if done == total // 2:
        print("half", flush=True)
        time.sleep(60)
merge_adapter(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_killed_merge_leaves_nothing_that_looks_finished(base_dir, make_adapter, tmp_path):
    adapter, out = make_adapter(base_dir), tmp_path / "out" / "merged"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED_MERGE, str(adapter), str(out)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    left = [p for p in out.parent.rglob("*") if p.is_file()]
    assert not any(p.name in ("config.json", "model.safetensors") for p in left)
    merge_adapter(adapter, out)  # and the next run clears up
    assert [p.name for p in out.parent.iterdir()] == ["merged"]


def test_shards(base_dir, make_adapter, tmp_path, monkeypatch):
    from qalora_plugin.files import writer

    adapter = make_adapter(base_dir)
    merge_adapter(adapter, tmp_path / "one")
    # 3000 bytes: the tensors of one layer fall into different shards
    split_plan = writer.split_plan
    monkeypatch.setattr(writer, "split_plan", lambda plan: split_plan(plan, 3000))
    merge_adapter(adapter, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    for name in CheckpointReader(tmp_path / "one").tensors:
        assert _bytes(tmp_path / "one", name) == _bytes(tmp_path / "many", name)


@pytest.mark.parametrize("checkpoint_has_head", [False, True])
def test_encoder_trained_in_another_class_than_it_was_saved_from(
    checkpoint_has_head, quantize, tmp_path
):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    saved: Any = BertForMaskedLM if checkpoint_has_head else BertModel
    trained: Any = BertModel if checkpoint_has_head else BertForSequenceClassification
    base = quantize(saved(config))
    task = None if checkpoint_has_head else "SEQ_CLS"
    settings = QALoRAConfig(r=2, init_lora_weights=False, task_type=task)
    model = get_peft_model(trained.from_pretrained(base), settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert (result.replaced == []) == checkpoint_has_head
    merged = trained.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(10)[None]
    assert torch.equal(merged(input_ids=ids)[0], model(input_ids=ids)[0])
    logits = verify_merge(result.out, tmp_path / "adapter", logits=True).logits
    assert logits is not None and logits.equal and logits.effect > 0
