"""What llama.cpp has to know of an architecture, as its convert_hf_to_gguf.py writes it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.layout import expert_place
from ...errors import CheckpointError
from ...files.names import CONFIG_FILE
from ..features import Family, head_size, read_config, rope_of
from . import FORMAT


@dataclass(frozen=True)
class Architecture:
    """The record of one model family.

    Args:
        name: llama.cpp's name.
        permuted: rows of q_proj and k_proj go from halves (Hugging Face) to pairs (llama.cpp).
        norm_plus_one: norms are stored without their 1 (Gemma).
    """

    name: str
    permuted: bool = False
    norm_plus_one: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", norm_plus_one=True),
    "gemma2": Architecture("gemma2", norm_plus_one=True),
    "gemma3_text": Architecture("gemma3", norm_plus_one=True),
    "mixtral": Architecture("llama", permuted=True),
    "olmoe": Architecture("olmoe"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3_moe": Architecture("qwen3moe"),
}

_ROPES = ("default", "linear", "yarn")
_ROUTING = frozenset({
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_local_experts",
})  # fmt: skip
FAMILIES = {
    "llama": Family(frozenset({"attention_bias", "mlp_bias"}), ropes=(*_ROPES, "llama3")),
    "mistral": Family(ropes=(*_ROPES, "llama3")),
    "qwen2": Family(ropes=_ROPES, any_head_size=False),
    "qwen3": Family(ropes=_ROPES),
    "gemma": Family(),
    "gemma2": Family(
        frozenset({
            "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar",
        }),
        windows=2,
    ),
    "gemma3_text": Family(
        frozenset({"query_pre_attn_scalar"}),
        {"rope_local_base_freq": 10000.0},
        windows=6,
        ropes=("default", "linear"),
    ),
    "mixtral": Family(_ROUTING, ropes=_ROPES),
    "olmoe": Family(_ROUTING, {"norm_topk_prob": False}),
    "qwen2_moe": Family(
        _ROUTING | {"shared_expert_intermediate_size"},
        {"norm_topk_prob": False},
        ropes=_ROPES,
        any_head_size=False,
    ),
    "qwen3_moe": Family(_ROUTING, {"norm_topk_prob": True}, ropes=_ROPES),
}  # fmt: skip
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # whose attention llama.cpp scales otherwise


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows [heads * head_dim, ...] with the two halves of each head taken in turns."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Return Llama 3's stretch of each frequency, fp32 [head_dim / 2].

    This is `_compute_llama3_parameters` of transformers.
    """
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    factors = []
    for frequency in (rope["rope_theta"] ** -exponents).tolist():
        wavelength = 2 * math.pi / frequency
        smooth = (original / wavelength - low) / (high - low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


class Metadata:
    """config.json of a model that llama.cpp can run; `config` is transformers', with defaults."""

    def __init__(self, source: QuantizedCheckpoint) -> None:
        """Read and check it.

        Raises:
            CheckpointError: an architecture or a setting that llama.cpp does not have.
        """
        self.config: Any = read_config(source, FAMILIES, FORMAT.runs_in)
        self.architecture = ARCHITECTURES[self.config.model_type]
        self.heads: int = self.config.num_attention_heads
        self.kv_heads: int = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.head_dim = head_size(self.config)
        self._rope = rope_of(self.config)
        self._rope_type = self._rope["rope_type"]
        self._check_attention_scale(source.directory)
        if self.architecture.name == "olmoe" and self.kv_heads != self.heads:
            raise CheckpointError(
                f"{source.directory / CONFIG_FILE}: num_key_value_heads is {self.kv_heads}, but "
                f"{FORMAT.runs_in} has num_attention_heads ({self.heads}) built in for OLMoE. "
                "Choose format mlx."
            )

    def _check_attention_scale(self, directory: Path) -> None:
        """Refuse a scale of Gemma's attention that llama.cpp does not derive from sizes."""
        config, found = self.config, getattr(self.config, "query_pre_attn_scalar", None)
        if found is None:
            return
        of_27b = config.num_hidden_layers == _LAYERS_OF_27B[self.architecture.name]
        expected = config.hidden_size // self.heads if of_27b else self.head_dim
        if found != expected:
            raise CheckpointError(
                f"{directory / CONFIG_FILE}: query_pre_attn_scalar is {found}, but "
                f"{FORMAT.runs_in} has {expected} built in for these sizes. Choose a format that "
                "transformers loads, such as torchao."
            )

    def add_to(self, writer: Any) -> None:
        """Write the architecture's numbers."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_freq_base(float(self._rope["rope_theta"]))
        if self.architecture.permuted:
            writer.add_rope_dimension_count(self.head_dim)
        if self.architecture.name in ("gemma2", "gemma3") and config.sliding_window:
            writer.add_sliding_window(config.sliding_window)
        if self.architecture.name == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
        if getattr(config, "num_experts_per_tok", None):
            self._add_experts(writer)
        if self._rope_type in ("linear", "yarn"):
            kinds = FORMAT.library("gguf").RopeScalingType
            writer.add_rope_scaling_type(kinds[self._rope_type.upper()])
            writer.add_rope_scaling_factor(float(self._rope["factor"]))
        if self._rope_type == "yarn":
            original = self._rope["original_max_position_embeddings"]
            writer.add_rope_scaling_orig_ctx_len(original)

    def _add_experts(self, writer: Any) -> None:
        config = self.config
        names = ("num_experts", "num_local_experts")
        writer.add_expert_count(next(getattr(config, n) for n in names if hasattr(config, n)))
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            width = config.shared_expert_intermediate_size
            writer.add_expert_shared_feed_forward_length(width)

    def rope_factors(self) -> torch.Tensor | None:
        """Return Llama 3's stretch of each frequency, fp32 [head_dim / 2], None without."""
        if self._rope_type != "llama3":
            return None
        return llama3_factors(self._rope, self.head_dim)

    def in_pairs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with its rows as llama.cpp has them: rotary pairs are neighbours."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        if heads is None or not self.architecture.permuted:
            return tensor
        return interleave(tensor, heads)

    def tensor_names(self, source: QuantizedCheckpoint) -> dict[str, str]:
        """Return {name in the source: name in GGUF}, in the order of the source's files.

        A quantized layer is there as its `weight`. Those of all experts have one name in GGUF.

        Raises:
            CheckpointError: llama.cpp has no place for a tensor.
        """
        gguf, family = FORMAT.library("gguf"), self.architecture.name
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
        table = gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)
        tied = bool(self.config.tie_word_embeddings)
        other = set(source.dense_names)
        names = {}
        for tensor in source.reader.tensors:
            layer, _, part = tensor.rpartition(".")
            if tensor not in other and part != source.integers:
                continue
            wanted = tensor if tensor in other else f"{layer}.weight"
            if tied and wanted == "lm_head.weight":
                continue  # a copy of the embedding
            place = None if tensor in other else expert_place(layer)
            known = wanted if place is None else f"{place.experts}.{place.projection}.weight"
            found = table.get_name(known, try_suffixes=(".weight", ".bias"))
            if found is None:
                dense = " Experts in 16 bits are not written: quantize them."
                raise CheckpointError(
                    f"{source.directory}: llama.cpp's {family} has no place for the tensor "
                    f"{wanted}.{dense if expert_place(layer) else ''}"
                )
            names[wanted] = found
        return names
