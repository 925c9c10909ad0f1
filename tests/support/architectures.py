"""Tiny models of many architectures, built from config with random weights."""

import torch
import transformers as tf

_COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GATED = {**_COMMON, "intermediate_size": 43, "num_key_value_heads": 2, "head_dim": 8}
_PLAIN = {**_COMMON, "intermediate_size": 48}
_VISION = {key: value for key, value in _PLAIN.items() if key != "vocab_size"}

ARCHITECTURES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GATED)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GATED, sliding_window=6)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GATED, tie_word_embeddings=True)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GATED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GATED, sliding_window=6)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **_GATED, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    # with a vision tower, which stays as it is
    "gemma3_multimodal": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config={**_GATED, "sliding_window": 6},
            vision_config={**_VISION, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            image_token_index=93,
            boi_token_index=94,
            eoi_token_index=95,
        )
    ),
    # one whose vision tower does not say so by `main_input_name`
    "idefics3": lambda: tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(
            text_config={**_GATED, "model_type": "llama"},
            vision_config={**_VISION, "image_size": 28, "patch_size": 14, "num_hidden_layers": 8},
            image_token_id=93,
            pad_token_id=0,
        )
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_PLAIN)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_PLAIN)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**_COMMON, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_PLAIN)),
    "bert_classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_PLAIN)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    # its embedding is stored under the name that it is tied to
    "t5_encoder": lambda: tf.T5EncoderModel(
        tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}


def save(name, directory, dtype=torch.float32, **kwargs):
    """Write a tiny model of the architecture `name`; every parameter is random, biases too."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(directory, **kwargs)
    return directory


def token_ids(samples=2, seq_len=12):
    """Calibration token ids."""
    return torch.randint(0, 90, (samples, seq_len), generator=torch.Generator().manual_seed(1))
