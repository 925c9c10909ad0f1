"""Tiny mixtures of random weights, of every family that is tested: 2 layers, 8 experts."""

import torch
import transformers as tf

_SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    tie_word_embeddings=False,
)
INNER = 44  # width of an expert: no multiple of 16 or 32, so that groups are short

MIXTURES = {
    "qwen3_moe": lambda sizes, inner: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(
            **sizes, num_experts=8, moe_intermediate_size=inner, head_dim=8, norm_topk_prob=True
        )
    ),
    "mixtral": lambda sizes, inner: tf.MixtralForCausalLM(
        tf.MixtralConfig(**sizes, num_local_experts=8, intermediate_size=inner)
    ),
    "olmoe": lambda sizes, inner: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**sizes | {"num_key_value_heads": 4}, num_experts=8, intermediate_size=inner)
    ),
    # its files hold the experts fused
    "granitemoe": lambda sizes, inner: tf.GraniteMoeForCausalLM(
        tf.GraniteMoeConfig(**sizes, num_local_experts=8, intermediate_size=inner)
    ),
    "qwen2_moe": lambda sizes, inner: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **sizes,
            num_experts=8,
            moe_intermediate_size=inner,
            shared_expert_intermediate_size=64,
            intermediate_size=64,
        )
    ),
    "deepseek_v3": lambda sizes, inner: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **sizes | {"num_key_value_heads": 4},
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            n_shared_experts=1,
            moe_intermediate_size=inner,
            intermediate_size=64,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
    ),
}  # fmt: skip
LINEARS = {
    "qwen3_moe": 56, "mixtral": 56, "olmoe": 56, "granitemoe": 56, "qwen2_moe": 62,
    "deepseek_v3": 40,
}  # fmt: skip
"""The linear layers in the blocks of each, an expert's projections counted one by one."""


def mixture(name, inner=INNER, **sizes):
    """Return a mixture of random weights; a router's are large, so that it prefers some experts."""
    torch.manual_seed(0)
    model = MIXTURES[name](_SIZES | sizes, inner)
    for key, parameter in model.named_parameters():
        if key.endswith(("mlp.gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
