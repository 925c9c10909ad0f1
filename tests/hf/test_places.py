"""Every tensor of a checkpoint has a place in the model, and every parameter a tensor."""

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from qalora_plugin import QALoRAQuantConfig, quantize_model
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.errors import CheckpointError, QALoRAError

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "moe_intermediate_size": 32, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16}
LATENT |= {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2}
LATENT |= {"num_experts_per_tok": 2, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES = {
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SIZES, num_experts=4, head_dim=16),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**SIZES, num_experts=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(**SIZES, num_experts=4),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**SIZES | LATENT),
}
# experts without gates, which are computed in another way
UNGATED = tf.NemotronHConfig(
    **SIZES,
    head_dim=16,
    layers_block_type=["moe", "attention"],
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_shared_expert_intermediate_size=32,
    time_step_limit=(0.0, 1.0),  # the default does not survive being saved
)
OURS = {"quantization_config": QALoRAQuantConfig(bits=4, group_size=32)}


def stock_layer(name, weight):
    """GPTQ's tensors of one layer, of 4 bits in groups of 32, whose integers are all zero."""
    n, k = weight.shape
    return {
        f"{name}.qweight": torch.zeros(k // 8, n, dtype=torch.int32),
        f"{name}.qzeros": torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.full((k // 32, n), 0.01, dtype=torch.float16),
        f"{name}.g_idx": torch.arange(k, dtype=torch.int32) // 32,
    }


def write_stock(directory, quantized=("_proj", ".w1", ".w2", ".w3")):
    """Turn a 16-bit directory into a stock GPTQ one: layers with these endings are quantized."""
    path, config = directory / "model.safetensors", directory / "config.json"
    state = {}
    for name, tensor in load_file(path).items():
        layer = name.removesuffix(".weight")
        chosen = layer.endswith(quantized)
        state |= stock_layer(layer, tensor) if chosen else {name: tensor}
    save_file(state, path, metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    values = json.loads(config.read_text()) | {"quantization_config": settings | {"sym": True}}
    config.write_text(json.dumps(values))
    return directory


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory):
    """A 16-bit mixture, its experts stored one by one."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp(request.param) / "dense"
    AutoModelForCausalLM.from_config(MIXTURES[request.param]()).save_pretrained(directory)
    return directory


def test_experts_that_we_have_no_layer_for_are_refused(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(UNGATED).save_pretrained(tmp_path / "dense")
    with pytest.raises(QALoRAError, match=r"experts\.0\.\w+\.weight is stored in another form"):
        quantize_model(tmp_path / "dense", tmp_path / "q", method="rtn", group_size=32)
    assert not (tmp_path / "q").exists()
    directory = write_stock(shutil.copytree(tmp_path / "dense", tmp_path / "stock"))
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+ is a quantized layer of its own"):
        AutoModelForCausalLM.from_pretrained(directory)
    found = describe(directory)
    assert not found["valid"] and "transformers fuses it with others" in found["problem"]


def test_a_mixture_whose_dense_experts_are_fused_while_it_loads(mixture):
    kept = QALoRAQuantConfig(bits=4, group_size=32, modules_to_not_convert=["experts"])
    model, info = AutoModelForCausalLM.from_pretrained(
        mixture, quantization_config=kept, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    dense = AutoModelForCausalLM.from_pretrained(mixture)
    for name, parameter in dense.named_parameters():
        if ".experts." in name:
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_stock_mixture_whose_attention_alone_is_quantized(mixture, tmp_path):
    attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj")
    directory = write_stock(shutil.copytree(mixture, tmp_path / "stock"), attention)
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()) and describe(directory)["valid"]
    assert sum(hasattr(module, "qweight") for module in model.modules()) >= 4


def without(*endings):
    """Drop the tensors whose names end so."""

    def change(state, config):
        for name in [name for name in state if name.endswith(endings)]:
            del state[name]

    return change


def with_settings(**settings):
    """Change config.json."""
    return lambda state, config: config.update(settings)


def with_tensor(name, *shape):
    """Add a tensor."""
    return lambda state, config: state.update({name: torch.ones(shape)})


def rename(old, new):
    """Rename what begins with `old`."""

    def change(state, config):
        for name in [name for name in state if name.startswith(old)]:
            state[new + name.removeprefix(old)] = state.pop(name)

    return change


def second_head(state, config):
    """A quantized layer for which the architecture has no place."""
    layer = "model.layers.1.mlp.down_proj"
    for name in [name for name in state if name.startswith(layer)]:
        state["model.down_proj" + name.removeprefix(layer)] = state[name].clone()


WRONG = {
    "fewer layers in config": (with_settings(num_hidden_layers=1), "layers.1.* has no place"),
    "more layers in config": (with_settings(num_hidden_layers=3), "no tensor for model.layers.2"),
    "no final norm": (without("model.norm.weight"), "no tensor for model.norm.weight"),
    "no norm in a block": (without("1.input_layernorm.weight"), "no tensor for model.layers.1"),
    "no embedding": (without("embed_tokens.weight"), "no tensor for model.embed_tokens"),
    "no head": (without("lm_head.weight"), "no tensor for lm_head.weight"),
    "biases in config": (with_settings(attention_bias=True), r"no tensor for .*_proj.bias|bias is"),
    "a bias of a norm": (with_tensor("model.norm.bias", 64), "model.norm.bias .* no place"),
    "a surplus norm": (with_tensor("model.layers.0.q_norm.weight", 16), "q_norm.* no place"),
    "a renamed block": (rename("model.layers.1.", "model.layers.7."), "layers.7.* no place"),
    "a renamed model": (rename("model.", "transformer."), "transformer.* no place|none of"),
    "a bias of the head": (with_tensor("lm_head.bias", 64), "lm_head.bias .* no place"),
    "a stray quantized layer": (second_head, "down_proj.* no place"),
}


@pytest.fixture
def changed(tmp_path):
    """Copy a directory, and change its tensors and its config.json."""

    def make(source, change):
        target = shutil.copytree(source, tmp_path / "changed")
        path = target / "model.safetensors"
        state, config = load_file(path), json.loads((target / "config.json").read_text())
        change(state, config)
        save_file(state, path, metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
        (target / "qalora_manifest.json").unlink(missing_ok=True)
        return target

    return make


@pytest.mark.parametrize("case", WRONG)
def test_our_checkpoint_that_is_not_the_model_is_refused(case, base_dir, changed):
    change, why = WRONG[case]
    directory = changed(base_dir, change)
    with pytest.raises(QALoRAError, match=why):
        AutoModelForCausalLM.from_pretrained(directory)
    assert not describe(directory)["valid"]


@pytest.mark.parametrize("case", WRONG)
def test_a_16_bit_model_that_is_not_whole_is_not_quantized(case, dense_dir, changed, tmp_path):
    change, why = WRONG[case]
    directory = changed(dense_dir, change)
    with pytest.raises(QALoRAError, match=why):
        AutoModelForCausalLM.from_pretrained(directory, **OURS)
    with pytest.raises(QALoRAError, match=why):
        quantize_model(directory, tmp_path / "q", method="rtn", group_size=32)


@pytest.mark.parametrize("case", ["fewer layers in config", "no norm in a block", "no embedding"])
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_needs_its_blocks_too(kind, case, base_dir, changed):
    change, why = WRONG[case]
    with pytest.raises(CheckpointError, match=why.replace("model.", "(model.)?")):
        kind.from_pretrained(changed(base_dir, change))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_another_class_may_lack_the_head_and_have_a_new_one(kind, base_dir):
    _, info = kind.from_pretrained(base_dir, output_loading_info=True)
    assert info["missing_keys"] <= {"score.weight"}


def test_what_older_releases_stored_is_no_surplus(base_dir, changed):
    old = with_tensor("model.layers.0.self_attn.rotary_emb.inv_freq", 8)
    directory = changed(base_dir, old)
    assert describe(directory)["valid"]
    AutoModelForCausalLM.from_pretrained(directory)


def test_a_head_that_is_stored_although_it_is_tied(dense_dir, changed):
    def tie(state, config):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = True

    AutoModelForCausalLM.from_pretrained(changed(dense_dir, tie), **OURS)
