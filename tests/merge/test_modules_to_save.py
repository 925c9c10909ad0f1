"""Whole tensors in an adapter: trained embeddings of tied bases, new heads, new vocabularies."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.adapters import PREFIX, edit_json, edit_tensors
from support.directories import unbound
from support.models import llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from qalora_plugin import QALoRAConfig, export_model, merge_adapter, verify_merge
from qalora_plugin.errors import AdapterError
from qalora_plugin.files.reader import CheckpointReader

Make = Callable[..., Path]
IDS = torch.arange(10)[None]
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _trained(model, out, **config):
    """Adapt a model, change all that can be trained, and save the adapter."""
    torch.manual_seed(1)
    trained = get_peft_model(model, QALoRAConfig(r=2, init_lora_weights=False, **config)).eval()
    for name, parameter in trained.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    trained.save_pretrained(out)
    return trained


@torch.no_grad()
def _output(model):
    return model.eval()(input_ids=IDS)[0]


def _assert_same(model, trained):
    # not equal: dense layers that lie unaligned in a file may round differently
    torch.testing.assert_close(_output(model), _output(trained), rtol=0, atol=1e-6)


def _config(directory):
    return json.loads((directory / "config.json").read_text())


TIED: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=32, n_layer=1, n_head=2)),
        ["word_embeddings"],
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES)), ["word_embeddings"]),
    "neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, tie_word_embeddings=True)),
        ["embed_in"],
    ),
    "llama": (
        lambda: llama(**SIZES, tie_word_embeddings=True),
        ["embed_tokens"],
    ),
    "llama head": (
        lambda: llama(**SIZES, tie_word_embeddings=True),
        ["lm_head"],
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_trained_half_of_a_tied_pair_is_untied(name, quantize, tmp_path):
    make, modules_to_save = TIED[name]
    torch.manual_seed(0)
    model = make()
    base = quantize(model)
    assert _config(base).get("tie_word_embeddings", True)
    model_class: Any = type(model)
    trained = _trained(
        model_class.from_pretrained(base), tmp_path / "adapter", modules_to_save=modules_to_save
    )
    out = merge_adapter(tmp_path / "adapter", tmp_path / "merged").out
    assert _config(out)["tie_word_embeddings"] is False
    _assert_same(model_class.from_pretrained(out), trained)
    report = verify_merge(out, tmp_path / "adapter", logits=True)
    assert report.logits is not None and report.logits.equal and report.modules_to_save == 1


def test_model_that_cannot_be_untied_is_refused(quantize, tmp_path):
    config = T5Config(vocab_size=48, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    base = quantize(T5ForConditionalGeneration(config))
    model = T5ForConditionalGeneration.from_pretrained(base)
    _trained(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head.weight: the base ties .* cannot be loaded un"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules_to_save", [None, ["embed_tokens", "lm_head"], ["embed_tokens"]])
def test_resized_vocabulary(modules_to_save, tied, quantize, tmp_path):
    base = quantize(llama(**SIZES, tie_word_embeddings=tied))
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(56, mean_resizing=False)
    trained = _trained(
        model, tmp_path / "adapter", modules_to_save=modules_to_save, task_type="CAUSAL_LM"
    )
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    config = _config(result.out)
    assert config["vocab_size"] == 56
    still_tied = tied and modules_to_save is None
    assert config["tie_word_embeddings"] is still_tied
    embeddings = ["model.embed_tokens.weight"]
    assert result.replaced == (embeddings if still_tied else ["lm_head.weight", *embeddings])
    merged = AutoModelForCausalLM.from_pretrained(result.out)
    _assert_same(merged, trained)
    report = verify_merge(result.out, tmp_path / "adapter", base, logits=True)
    assert report.logits is not None and report.logits.equal


def test_a_base_that_stores_a_tied_tensor_twice(tied_base_dir, make_adapter, tmp_path):
    base, names = tmp_path / "base", ("model.embed_tokens.weight", "lm_head.weight")
    shutil.copytree(tied_base_dir, base)
    embeddings = load_file(base / "model.safetensors")[names[0]]
    edit_tensors(base / "model.safetensors", lambda t: t.update({names[1]: embeddings.clone()}))
    extra = {f"{PREFIX}{name}": embeddings + 1 for name in names}
    adapter = make_adapter(base, extra=extra, modules_to_save=["embed_tokens", "lm_head"])
    out = merge_adapter(adapter, tmp_path / "merged").out
    stored, merged = CheckpointReader(out), AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(stored.get(name), embeddings + 1) for name in names)
    assert torch.equal(merged.lm_head.weight, embeddings + 1)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("modules_to_save", [None, ["word_embeddings"]])
def test_resized_vocabulary_with_a_tied_bias(modules_to_save, quantize, tmp_path):
    # of the two names of its bias the base stores one, the adapter the other
    base = quantize(BertForMaskedLM(BertConfig(**SIZES)))
    model = BertForMaskedLM.from_pretrained(base)
    model.resize_token_embeddings(56, mean_resizing=False)
    trained = _trained(model, tmp_path / "adapter", modules_to_save=modules_to_save)
    out = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base).out
    assert _config(out)["tie_word_embeddings"] is (modules_to_save is None)
    _assert_same(BertForMaskedLM.from_pretrained(out), trained)
    report = verify_merge(out, tmp_path / "adapter", base, logits=True)
    assert report.logits is not None and report.logits.equal
    exported = export_model(tmp_path / "adapter", tmp_path / "lora", "lora", base=base).out
    assert f"{PREFIX}cls.predictions.decoder.bias" in load_file(
        exported / "adapter_model.safetensors"
    )


def test_embeddings_that_are_the_bases_are_not_replaced(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    get_peft_model(model, QALoRAConfig(r=2)).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=True
    )
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged", base_dir)
    assert result.replaced == []
    head = CheckpointReader(result.out).get("lm_head.weight")
    assert torch.equal(head, CheckpointReader(base_dir).get("lm_head.weight"))


def test_tensor_that_belongs_to_nothing_is_refused(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, extra={f"{PREFIX}model.norm.weight": torch.ones(64)})
    with pytest.raises(AdapterError, match=r"extra key .*norm\.weight: .*modules_to_save"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_head_of_integers_is_refused(base_dir, make_adapter, tmp_path):
    head = {f"{PREFIX}lm_head.weight": torch.ones(64, 64, dtype=torch.uint8)}
    adapter = make_adapter(base_dir, extra=head, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head.weight: expected bfloat16.*found uint8"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("tied", [False, True])
def test_lost_tensor_is_noticed(tied, base_dir, tied_base_dir, make_adapter, tmp_path):
    # a tied base has no lm_head.weight of its own: the class knows that there is one
    adapter = make_adapter(tied_base_dir if tied else base_dir, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"missing key base_model\.model\.lm_head\.weight"):
        merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_classifier_on_a_causal_base(num_labels, base_dir, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=num_labels)
    trained = _trained(model, tmp_path / "adapter", task_type="SEQ_CLS")
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert result.replaced == ["score.weight"]
    merged = AutoModelForSequenceClassification.from_pretrained(result.out)
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert merged.config.num_labels == num_labels
    _assert_same(merged, trained)
    report = verify_merge(result.out, tmp_path / "adapter", logits=True)
    assert report.logits is not None and report.logits.equal


def test_token_classifier_on_a_causal_base(base_dir, tmp_path):
    model = AutoModelForTokenClassification.from_pretrained(base_dir, num_labels=3)
    trained = _trained(model, tmp_path / "adapter", task_type="TOKEN_CLS")
    result = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert result.replaced == ["score.bias", "score.weight"]
    merged = AutoModelForTokenClassification.from_pretrained(result.out)
    assert merged.config.num_labels == 3
    _assert_same(merged, trained)


def test_lost_head_is_noticed(base_dir, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(base_dir, num_labels=3)
    _trained(model, tmp_path / "adapter", task_type="SEQ_CLS")
    edit_tensors(tmp_path / "adapter", lambda t: t.pop(f"{PREFIX}score.weight"))
    with pytest.raises(AdapterError, match=r"missing key base_model\.model\.score\.weight"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("saved", [False, True])
def test_layer_that_stayed_random_is_refused(saved, quantize, tmp_path):
    # a masked LM has no pooler, and PEFT saves the one of the classifier only if it is told to
    base = quantize(BertForMaskedLM(BertConfig(**SIZES)))
    model = BertForSequenceClassification.from_pretrained(base)
    trained = _trained(
        model,
        tmp_path / "adapter",
        task_type="SEQ_CLS",
        modules_to_save=["pooler"] if saved else None,
    )
    if not saved:
        with pytest.raises(AdapterError, match=r"has bert\.pooler\.dense\.bias, .* is lost"):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        return
    out = merge_adapter(tmp_path / "adapter", tmp_path / "merged").out
    _assert_same(BertForSequenceClassification.from_pretrained(out), trained)
    report = verify_merge(out, tmp_path / "adapter", logits=True)
    assert report.logits is not None and report.logits.equal


@pytest.mark.parametrize("tied", [None, False])
def test_class_that_transformers_does_not_know(tied, base_dir, make_adapter, tmp_path):
    base = unbound(shutil.copytree(base_dir, tmp_path / "base"))
    changes = {"model_type": "its-own", "architectures": ["ItsOwnForCausalLM"]}
    edit_json(base / "config.json", **changes, tie_word_embeddings=tied)
    extra = {
        f"{PREFIX}lm_head.weight": torch.ones(64, 64),
        f"{PREFIX}head.temperature": torch.tensor(2.0),
    }
    adapter = make_adapter(base, modules_to_save=["lm_head", "head"], extra=extra)
    if tied is None:
        with pytest.raises(AdapterError, match=r"has no class .*ItsOwnForCausalLM"):
            merge_adapter(adapter, tmp_path / "merged")
        return
    result = merge_adapter(adapter, tmp_path / "merged")
    assert result.replaced == ["head.temperature", "lm_head.weight"]
    assert verify_merge(result.out, adapter).modules_to_save == 2
