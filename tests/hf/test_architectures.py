"""Every kind of architecture: quantize while loading, save, load, same numbers."""

import re
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from support.architectures import ARCHITECTURES
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig
from qalora_plugin.architecture import selection
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.hf import quantizer
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.layers.sharded import ShardedQuantLinear
from qalora_plugin.tuner import QALoRALinear
from qalora_plugin.tuner.targets import base_identity

SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
)
GROUPED = SIZES | {"num_key_value_heads": 2}
ROTARY: dict[str, Any] = dict(
    vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, rotary_dim=8
)
NEO: dict[str, Any] = dict(
    vocab_size=64, hidden_size=64, num_layers=2, num_heads=4, max_position_embeddings=64
)
TOKENS: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)

MADE = ARCHITECTURES | {
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, head_dim=16)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=2)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    # these three compute buffers in the parents of their linear layers, when they are initialised
    "gpt_j": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**ROTARY)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**ROTARY, n_ctx=64)),
    "gpt_neo": lambda: tf.GPTNeoForCausalLM(
        tf.GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]])
    ),
    "bert_backbone": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
    "roberta_classifier": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SIZES)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**SIZES, **TOKENS)),
}
LAYERS = {
    "llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "gemma2": 14, "gemma3": 14,
    "gemma3_multimodal": 14, "idefics3": 14, "phi": 12, "gpt_neox": 8, "opt": 12, "bert": 12,
    "bert_classifier": 12, "distilbert": 12, "t5_encoder": 12, "gemma": 14, "mixtral": 20,
    "phi3": 8, "gpt_j": 12, "codegen": 8, "gpt_neo": 12, "bert_backbone": 12,
    "roberta_classifier": 12, "modernbert": 8,
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    return MADE[name]().eval()


@pytest.mark.parametrize("name", MADE)
def test_round_trip(name, tmp_path):
    dense, layers = make(name), LAYERS[name]
    kind = type(dense)
    for key, parameter in dense.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    dense.save_pretrained(tmp_path / "dense")
    model, info = kind.from_pretrained(
        tmp_path / "dense",
        quantization_config=QALoRAQuantConfig(bits=8, group_size=16),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == layers
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = dense(ids)[0], model(ids)[0]
    # eight bits: close to the dense model, so every weight and bias is where it belongs
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())

    model.save_pretrained(tmp_path / "quantized")
    assert len(open_quantized(tmp_path / "quantized").layers) == layers
    again, info = kind.from_pretrained(tmp_path / "quantized", output_loading_info=True)
    assert not any(info.values()), info
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]), key
    for key, buffer in dense.named_buffers():  # also those that are in no file
        assert torch.equal(model.get_buffer(key), buffer), key
        assert torch.equal(again.get_buffer(key), buffer), key
    with torch.no_grad():
        # not bit for bit: weights mapped from a file are aligned differently
        torch.testing.assert_close(again(ids)[0], found, rtol=1e-5, atol=1e-6)


def test_a_backbone_from_a_model_with_a_head_and_the_other_way_round(tmp_path):
    make("bert_classifier").save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "dense", quantization_config=QALoRAQuantConfig(bits=4, group_size=16)
    )
    model.save_pretrained(tmp_path / "q")
    backbone = AutoModel.from_pretrained(tmp_path / "q", dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.bert(ids)[0]
        torch.testing.assert_close(backbone(ids)[0], expected, rtol=1e-5, atol=1e-6)
        backbone.save_pretrained(tmp_path / "backbone")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "backbone")
        torch.testing.assert_close(again.bert(ids)[0], expected, rtol=1e-5, atol=1e-6)
    assert type(again.classifier) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_asks_for_the_dtype_of_weights(dtype, tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    dense = T5ForConditionalGeneration.from_pretrained(tmp_path / "dense", dtype=dtype)
    ids = torch.arange(3, 15)[None]
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    with torch.no_grad():
        expected = dense(**inputs).logits
    quantized = QALoRAQuantConfig(bits=8, group_size=16)
    T5ForConditionalGeneration.from_pretrained(
        tmp_path / "dense", dtype=dtype, quantization_config=quantized
    ).save_pretrained(tmp_path / "q")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "q", dtype=dtype)
    for name, parameter in dense.named_parameters():
        if name.endswith(("wi.weight", "wo.weight")):  # wo stays fp32 in fp16
            assert model.get_submodule(name.removesuffix(".weight")).weight.dtype == parameter.dtype
    near: dict[str, Any] = dict(rtol=0, atol=0.03 * expected.abs().max().item())
    with torch.no_grad():
        found = model(**inputs).logits
        torch.testing.assert_close(found, expected, **near)
        adapted = get_peft_model(model, QALoRAConfig(r=4, task_type="SEQ_2_SEQ_LM"))
        layer = adapted.get_base_model().encoder.block[0].layer[1].DenseReluDense.wi
        assert isinstance(layer, QALoRALinear) and layer.weight.dtype == dtype
        assert torch.equal(adapted(**inputs).logits, found)  # B is zero


def test_layers_that_no_tensor_came_for(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "small")
    config.num_layers = 2  # the second block would be random
    with pytest.raises(CheckpointError, match=r"no tensor for encoder\.block\.1\..* \(8 such\)"):
        T5ForConditionalGeneration.from_pretrained(
            tmp_path / "small",
            config=config,
            quantization_config=QALoRAQuantConfig(bits=8, group_size=16),
        )


@pytest.mark.parametrize(
    "config, kept",
    [
        (
            tf.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, state_size=8),
            ["mixer.dt_proj", "mixer.out_proj", "mixer.x_proj"],
        ),
        (
            tf.RwkvConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, context_length=64),
            ["attention.output", "feed_forward.value"],
        ),
    ],
    ids=["mamba", "rwkv"],
)
def test_a_model_that_computes_with_weights_itself(config, kept, tmp_path, monkeypatch):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match=re.escape(f"with {kept} in modules_to_not_convert")):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=QALoRAQuantConfig(bits=8, group_size=16)
        )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=QALoRAQuantConfig(bits=8, group_size=16, modules_to_not_convert=kept),
    )
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = dense(ids)[0], model(ids)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())

    with monkeypatch.context() as patch:  # a directory that an earlier release quantized whole
        patch.setattr(selection, "_READ_BY_PARENT", {})
        whole = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=QALoRAQuantConfig(bits=8, group_size=16)
        )
        whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="cannot be quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    with pytest.raises(ConfigError, match="the layer does not hold"):
        whole.eval()(ids)


def test_layers_that_share_a_weight_are_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "attention_head_dim": 16}
    sizes |= {"mamba_headdim": 16, "n_mamba_heads": 4, "mamba_ngroups": 1, "num_mem_blocks": 1}
    layers = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
    layers["hybrid_layer_ids"] = [1, 3]
    config = tf.Zamba2Config(num_attention_heads=4, vocab_size=96, **sizes, **layers)
    with torch.device("meta"):
        model = tf.Zamba2ForCausalLM(config)
    with pytest.raises(ConfigError, match=r"and \S+layers.3\S+ are one tensor"):
        selection.linears_to_quantize(model)
    assert len(selection.linears_to_quantize(model, ["shared_transformer"])) == 10


@pytest.mark.parametrize("name", ["gpt_j", "modernbert"])
def test_loading_layer_by_layer_initialises_the_parents_too(name, tmp_path, monkeypatch):
    dense = make(name)
    kind = type(dense)
    dense.save_pretrained(tmp_path / "dense")
    settings = QALoRAQuantConfig(bits=8, group_size=32)
    kind.from_pretrained(tmp_path / "dense", quantization_config=settings).save_pretrained(
        tmp_path / "q"
    )
    monkeypatch.setattr(quantizer, "loads_sharded", lambda: True)  # as ZeRO-3 and FSDP load
    model = kind.from_pretrained(tmp_path / "q")
    assert any(isinstance(module, ShardedQuantLinear) for module in model.modules())
    for key, buffer in dense.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected, found = dense(ids)[0], model(ids)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_a_sharded_base_is_known_by_the_names_in_its_files(tmp_path, monkeypatch):
    model = make("gemma3_multimodal")
    model.save_pretrained(tmp_path / "dense")
    kind, settings = type(model), QALoRAQuantConfig(bits=4, group_size=16)
    quantized = kind.from_pretrained(tmp_path / "dense", quantization_config=settings)
    quantized.save_pretrained(tmp_path / "q")
    whole = base_identity(kind.from_pretrained(tmp_path / "q"))
    monkeypatch.setattr(quantizer, "loads_sharded", lambda: True)
    sharded = base_identity(kind.from_pretrained(tmp_path / "q"))
    assert whole == sharded
    assert len(set(whole.also)) == 2  # the files call the layers otherwise than the model
