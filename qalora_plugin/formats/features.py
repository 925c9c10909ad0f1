"""What a runtime reads of a config.json, so that no export drops a feature of the model unsaid.

A format that describes the model anew for its runtime has a table with one `Family` for each
`model_type`. A setting that is neither written nor what the runtime has built in is refused by
name. The formats that transformers itself loads (torchao, gptq, compressed-tensors, lora) take
config.json along as it is, and need no table.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..architecture.model import auto_class_names, read_hf_config
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..errors import CheckpointError
from ..files.names import CONFIG_FILE

# every runtime is told of these
_SIZES = frozenset({
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "tie_word_embeddings", "vocab_size",
})  # fmt: skip
# these change no logits, or have a check of their own below
_HARMLESS = frozenset({
    "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "layer_types",
    "max_window_layers", "output_router_logits", "pad_token_id", "pretraining_tp",
    "rope_parameters", "router_aux_loss_coef", "router_jitter_noise", "sliding_window", "use_cache",
    "use_sliding_window", "_sliding_window_pattern",
})  # fmt: skip
_FULL, _SLIDING = "full_attention", "sliding_attention"
# what transformers reads beyond sizes and factor (modeling_rope_utils.py), and takes without it
_ROPE_KEYS: dict[str, dict[str, Any]] = {
    "default": {"partial_rotary_factor": 1.0},
    "linear": {"partial_rotary_factor": 1.0},
    "llama3": {"partial_rotary_factor": 1.0},
    "yarn": {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True,
             "attention_factor": None, "mscale": None, "mscale_all_dim": None},
}  # fmt: skip
NAMED = "named"
PERIODIC = "periodic"


@dataclass(frozen=True)
class Family:
    """One model family in one runtime.

    Args:
        written: keys of config.json whose values the export carries, beside sizes.
        built_in: values that the runtime takes for granted, where they are not the defaults of
            transformers; also of keys that it has no default for.
        windows: the layers that the runtime gives a sliding window: those that are "named" to it,
            all but each n-th (n, or "periodic" where it is told n), or none.
        ropes: kinds of rotary embeddings that it has, for layers without a window.
        any_head_size: whether heads may have another size than hidden_size / num_attention_heads.
        head_sizes: the runtime's operators have heads of a multiple of this size only.
    """

    written: frozenset[str] = frozenset()
    built_in: Mapping[str, Any] = field(default_factory=dict)
    windows: str | int | None = None
    ropes: Collection[str] = ("default",)
    any_head_size: bool = True
    head_sizes: int = 1


def read_config(
    source: QuantizedCheckpoint, families: Mapping[str, Family], runs_in: str
) -> PreTrainedConfig:
    """Return the model's config, when the runtime computes with all of it what transformers does.

    Args:
        source: the model.
        families: what the runtime knows, by `model_type`.
        runs_in: name of the runtime, for messages.

    Raises:
        CheckpointError: names the setting that the runtime would drop, or cannot run.
    """
    stated = source.reader.config.get("model_type")
    where = f"{source.directory / CONFIG_FILE}: "
    family = families.get(str(stated))
    if family is None:
        raise CheckpointError(
            f"{where}model_type {stated!r} cannot be written for {runs_in}: {', '.join(families)} "
            "can."
        )
    config: PreTrainedConfig = read_hf_config(source.directory)
    problem = (
        _class_problem(config, runs_in)
        or _setting_problem(config, family, runs_in)
        or _window_problem(config, family, runs_in)
        or _rope_problem(config, family, runs_in)
        or _size_problem(config, family, runs_in)
    )
    if problem is not None:
        raise CheckpointError(
            f"{where}{problem}. Choose a format that transformers loads, such as torchao, which "
            "keeps every setting."
        )
    return config


def _class_problem(config: PreTrainedConfig, runs_in: str) -> str | None:
    """Say that a model is a classifier, such as a reward model, and no causal language model."""
    known = auto_class_names(transformers.AutoModelForCausalLM, config.model_type)
    for name in config.architectures or ():
        if name not in known and hasattr(transformers, name):  # others are old spellings
            return f"architectures: {name} is no causal language model, as {runs_in} would take it"
    return None


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def all_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config.json that leaves no default to whoever reads it.

    Keys that the config's class does not know are left out: transformers ignores them, but a
    runtime that reads config.json itself might not.
    """
    known = type(config)().to_dict().keys() | {"architectures", "head_dim"}
    found = {
        key: value
        for key, value in config.to_dict().items()
        if key in known and not key.startswith("_")
    }
    if "num_local_experts" in found:  # the name that most runtimes know beside Mixtral's
        found["num_experts"] = config.num_local_experts
    rope = config.rope_parameters
    kinds = [kind for kind in (_FULL, _SLIDING) if kind in rope]
    found["rope_parameters"] = (
        {kind: rope_of(config, kind) for kind in kinds} if kinds else rope_of(config)
    )
    return found


def _setting_problem(config: PreTrainedConfig, family: Family, runs_in: str) -> str | None:
    defaults = type(config)().to_dict()
    checked = defaults.keys() - _SIZES - _HARMLESS - PreTrainedConfig().to_dict().keys()
    for key in sorted(checked & family.written):
        if getattr(config, key) is None and defaults[key] is not None:
            return f"{key} is null, but {runs_in} always applies it for this architecture"
    for key in sorted(checked - family.written):
        expected, found = family.built_in.get(key, defaults[key]), getattr(config, key)
        if (found or None) != (expected or None):
            return (
                f"{key} is {found!r}, but {runs_in} has {expected!r} built in for this "
                "architecture, so it would compute something else"
            )
    return None


def _window_problem(config: Any, family: Family, runs_in: str) -> str | None:
    window, layers, rope = config_window(config), layer_kinds(config), config.rope_parameters
    if window is None and rope.get(_SLIDING) == rope.get(_FULL):  # all layers are alike
        return None
    if family.windows == NAMED:
        known = True
    elif family.windows == PERIODIC:
        known = period_of(layers) is not None
    else:
        known = family.windows is not None and layers == windowed_layers(
            len(layers), int(family.windows)
        )
    if known:
        return None
    if family.windows is not None:
        return f"layer_types {layers} are not those that {runs_in} has for this architecture"
    return (
        f"sliding_window {window} is not known to {runs_in} for this architecture, which would "
        f"attend to all tokens. For contexts of at most {window} tokens it changes nothing: set "
        f"max_position_embeddings to {window} to export for these"
    )


def config_window(config: Any) -> int | None:
    """Return the sliding window of a config, None if no layer has one that is ever full."""
    window = _known(config, "sliding_window")
    if not window or window >= config.max_position_embeddings:
        return None
    return int(window) if _SLIDING in layer_kinds(config) else None


def layer_kinds(config: Any) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer."""
    kinds = _known(config, "layer_types")
    if kinds:
        return list(kinds)
    kind = _SLIDING if _known(config, "sliding_window") else _FULL
    return [kind] * int(config.num_hidden_layers)


def _known(config: Any, key: str) -> Any:
    """Return a setting, None of one that the config's class, and so the model, does not know."""
    return getattr(config, key) if key in type(config)().to_dict() else None


def windowed_layers(count: int, period: int) -> list[str]:
    """Return the kinds of layers where each `period`-th is full, and all others have a window."""
    return [_SLIDING if (index + 1) % period else _FULL for index in range(count)]


def period_of(layers: list[str]) -> int | None:
    """Return n where each n-th layer is full and all others have a window, or None."""
    counts = range(1, len(layers) + 1)
    return next((n for n in counts if layers == windowed_layers(len(layers), n)), None)


def rope_of(config: Any, kind: str = _FULL) -> dict[str, Any]:
    """Return the rotary embeddings of layers of one kind, with what transformers fills in."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    rope = dict(rope.get(kind, rope))
    rope.setdefault("rope_type", "default")
    if rope["rope_type"] in ("yarn", "llama3"):
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return rope


def _rope_problem(config: Any, family: Family, runs_in: str) -> str | None:
    stated = config.rope_parameters
    kinds = [kind for kind in (_FULL, _SLIDING) if kind in stated] or [_FULL]
    for kind in kinds:
        rope, ropes = rope_of(config, kind), family.ropes if kind == _FULL else ("default",)
        rope_type = rope.pop("rope_type")
        if rope_type not in ropes:
            return f"rope_type {rope_type!r} is not written for {runs_in}: {', '.join(ropes)} are"
        theta = family.built_in.get("rope_local_base_freq")
        if kind == _SLIDING and theta is not None and rope["rope_theta"] != theta:
            return f"rope_theta of sliding layers is {rope['rope_theta']}, {runs_in} has {theta}"
        for key, usual in _ROPE_KEYS[rope_type].items():
            if rope.get(key) is not None and rope[key] != usual:
                return f"{key}={rope[key]!r} in rope_parameters is not written for {runs_in}"
    return None


def _size_problem(config: Any, family: Family, runs_in: str) -> str | None:
    size, usual = head_size(config), config.hidden_size // config.num_attention_heads
    if size != usual and not family.any_head_size:
        return (
            f"head_dim is {size}, but {runs_in} has hidden_size / num_attention_heads ({usual}) "
            "built in for this architecture"
        )
    if size % family.head_sizes:
        return (
            f"heads of {size} numbers cannot be run by {runs_in}, whose operators have multiples "
            f"of {family.head_sizes}"
        )
    return None
