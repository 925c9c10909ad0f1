"""Axolotl keys that contradict `adapter: qalora`, refused by name before anything is loaded."""

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError

ADAPTER = "qalora"

_QUANTIZED = "the base is quantized by `qalora:` (bits, group_size), or is a quantized directory"
_KERNELS = "Axolotl's LoRA kernels read dense weights"
_RELORA = "ReLoRA merges into 16-bit weights while training"
_LOST = (
    "what is trained beside the adapter is in none of its files, and the merge would lose it; use "
    "lora_modules_to_save for whole modules; remove it"
)
# keys that must not be set, and the reason
_REFUSED = {
    "load_in_4bit": f"{_QUANTIZED}; remove it",
    "load_in_8bit": f"{_QUANTIZED}; remove it, `qalora: {{bits: 8}}` is the nearest",
    "gptq": "GPTQ bases are recognised by themselves; remove it",
    "bnb_config_kwargs": f"{_QUANTIZED}; remove it",
    "model_quantization_config": f"{_QUANTIZED}; remove it",
    "peft_use_dora": "DoRA rescales whole weight rows, which offsets cannot hold; remove it",
    **{
        f"lora_{part}_kernel": f"{_KERNELS}; remove it" for part in ("mlp", "qkv", "o", "embedding")
    },
    "relora": f"{_RELORA}; remove it",
    "relora_steps": f"{_RELORA}; remove it",
    "jagged_restart_steps": "it restarts ReLoRA; remove it",
    "peft_layer_replication": "replicated layers would share integers; remove it",
    "peft_trainable_token_indices": "not supported; use lora_modules_to_save: [embed_tokens]",
    "lora_target_parameters": "only linear modules are quantized; use lora_target_modules",
    "lora_fan_in_fan_out": "only nn.Linear layers are quantized; remove it",
    "qlora_sharded_model_loading": "that loads bitsandbytes weights; remove it",
    "qat": "quantization-aware training changes the integers, which stay fixed here; remove it",
    "quantization": "that is torchao's, for `axolotl quantize`; use `qalora export`; remove it",
    "peft_ensure_weight_tying": "modules_to_save of a tied module is saved untied; remove it",
    "quantize_moe_experts": f"{_QUANTIZED}; remove it",
    "unfrozen_parameters": _LOST,
    "lisa_n_layers": _LOST,
    "fix_untrained_tokens": f"it changes embeddings in memory, and {_LOST}",
}
Config = Mapping[str, Any]


def _fsdp(cfg: Config, key: str) -> Any:
    """Return a key of `fsdp_config`, where it may begin with fsdp_, as `fsdp_version` beside it."""
    found = cfg.get("fsdp_config") or {}
    alone = cfg.get("fsdp_version") if key == "version" else None
    return found.get(key) or found.get(f"fsdp_{key}") or alone


def _uses_fsdp(cfg: Config) -> bool:
    return bool(cfg.get("fsdp") or cfg.get("fsdp_config"))


# other contradictions, and the message, in which {key} is the value of a key
_RULES: tuple[tuple[Callable[[Config], Any], str], ...] = (
    (
        lambda cfg: cfg.get("peft_autocast_adapter_dtype") is False,
        "does not go with peft_autocast_adapter_dtype: False: A and B are fp32 always; remove it",
    ),
    (
        lambda cfg: _uses_fsdp(cfg) and str(_fsdp(cfg, "version")) != "2",
        "does not go with the first FSDP, which flattens integers and adapter into one tensor: set "
        "fsdp_version: 2 and an fsdp_config (docs/multi_gpu.md), or use deepspeed: "
        "recipes/deepspeed/zero2.json or zero3.json",
    ),
    (
        lambda cfg: _uses_fsdp(cfg) and _fsdp(cfg, "state_dict_type") != "SHARDED_STATE_DICT",
        "with fsdp needs fsdp_config: {{state_dict_type: SHARDED_STATE_DICT}}: with another one "
        "Accelerate fails at the first checkpoint",
    ),
    (
        lambda cfg: _uses_fsdp(cfg) and _fsdp(cfg, "cpu_ram_efficient_loading"),
        "with fsdp needs fsdp_config: {{cpu_ram_efficient_loading: false}}: otherwise Axolotl "
        "leaves the buffers of a quantized model without numbers on all ranks but the first",
    ),
    (
        lambda cfg: _uses_fsdp(cfg) and (cfg.get("lora_modules_to_save") or cfg.get("rl")),
        "with fsdp does not go with lora_modules_to_save or rl: of those Axolotl saves only a part "
        "there. Use deepspeed: recipes/deepspeed/zero2.json or zero3.json",
    ),
    (
        lambda cfg: cfg.get("lm_eval_tasks") and cfg.get("lm_eval_post_train") is not False,
        "does not go with lm_eval_post_train: it runs `lm_eval` on output_dir, which is the "
        "adapter, in a process that does not know this package, as `axolotl lm-eval` does. Set "
        "lm_eval_post_train: false and afterwards run `qalora eval OUTPUT_DIR/merged --tasks "
        "TASK`; with qalora: {{merge_formats: [qalora, torchao]}} there is also a model that loads "
        "without this package",
    ),
    (
        # Axolotl hands these trainers a PEFT config, no adapter
        lambda cfg: (
            cfg.get("rl") in ("dpo", "ipo", "kto")
            and cfg.get("lora_model_dir")
            and not cfg.get("merge_lora")
        ),
        "with rl: {rl} does not go with lora_model_dir: the trainer makes the adapter itself. "
        "Merge that one (`qalora merge ADAPTER --out DIR`) and set base_model to the merged "
        "directory",
    ),
    (
        lambda cfg: (cfg.get("peft") or {}).get("loftq_config"),
        "does not go with peft.loftq_config: LoftQ starts from 16-bit residuals; remove it",
    ),
    (
        lambda cfg: cfg.get("peft_init_lora_weights") not in (None, True, False),
        "does not go with peft_init_lora_weights: {peft_init_lora_weights!r}: true and false are "
        "supported",
    ),
)


def check_best_is_kept(cfg: Config, args: Any) -> None:
    """Refuse a `load_best_model_at_end` that Axolotl has dropped; with the trainer's arguments.

    Raises:
        ConfigError: it would merge the last adapter, and not the best.
    """
    if cfg.get("load_best_model_at_end") and not args.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end: Axolotl has dropped it, and the last adapter would be merged. "
            "It wants eval_steps, save_steps that are a multiple of it, and val_set_size or "
            "test_datasets, and does not do it with rl. Set these, or remove it"
        )


def check_config(cfg: Config) -> None:
    """Refuse keys that would be ignored or that make a wrong model.

    Raises:
        ConfigError: names the key, its value, why, and what to do.
    """
    if cfg.get("adapter") != ADAPTER:
        if cfg.get("qalora"):
            raise ConfigError(
                f"qalora: goes with adapter: {ADAPTER}, found adapter: {cfg.get('adapter')!r}. "
                f"Set adapter: {ADAPTER}, or remove the block"
            )
        return
    for key, reason in _REFUSED.items():
        if cfg.get(key):
            raise ConfigError(f"adapter: {ADAPTER} does not go with {key}: {cfg[key]!r}: {reason}")
    for contradicts, message in _RULES:
        if contradicts(cfg):
            raise ConfigError(f"adapter: {ADAPTER} {message.format_map(cfg)}")
