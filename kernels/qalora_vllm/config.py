"""What vLLM asks of a quantized checkpoint's config, and which layers it is for."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from qalora_kernels.stored import GUARD, QUANT_METHOD, StoredConfig, is_excluded

from .method import QALoRALinearMethod
from .reading import check_names, read_config


class QALoRAVLLMConfig(QuantizationConfig):
    """The quantization of a checkpoint, as vLLM knows it.

    Args:
        stored: what config.json says.
    """

    def __init__(self, stored: StoredConfig):
        super().__init__()
        self.stored = stored
        self.tensors: set[str] = set()
        """Names of the checkpoint's tensors, where vLLM can list them before it loads them; guards
        of quantized layers, which are called `weight` too, are left out."""

    @classmethod
    def get_name(cls) -> str:
        """Return config.json's `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the dtypes of activations that the operators take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the oldest compute capability that Triton compiles for, 8.0, as vLLM writes it."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "QALoRAVLLMConfig":
        """Return the config that config.json's `quantization_config` says.

        Raises:
            ValueError: a key that is not known, or a newer `format_version`.
        """
        return cls(read_config(config))

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Drop nothing: vLLM's own drops the `g_idx` of act-order."""
        return WeightsMapper()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Translate the names in the config to those that vLLM gives to modules."""
        stored = self.stored
        self.tensors = set(hf_to_vllm_mapper.apply_list(sorted(self.tensors)))
        stored.dynamic = hf_to_vllm_mapper.apply_dict(stored.dynamic)
        if stored.modules_to_not_convert is not None:
            names = hf_to_vllm_mapper.apply_list(stored.modules_to_not_convert)
            stored.modules_to_not_convert = names

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look at the names of the checkpoint's tensors, where they can be had.

        Raises:
            ValueError: a tensor of a quantized layer is missing or surplus.
        """
        found = get_safetensors_params_metadata(model_name, revision=revision)
        if found:
            check_names(found, self.stored)
        guards = {n for n, i in found.items() if n.endswith(f".{GUARD}") and i["shape"] == [1]}
        self.tensors = found.keys() - guards

    def layer_names(self, prefix: str) -> list[str]:
        """Return the layers of the checkpoint that vLLM's layer `prefix` joins, or itself."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def is_dense(self, prefix: str) -> bool:
        """Say whether `modules_to_not_convert` lists all of what a layer joins.

        A router is a linear layer here but none in transformers, so that nothing lists it; where
        the names of the tensors are known, they say that its weight is whole.

        Raises:
            ValueError: it lists some of it only.
        """
        names = self.layer_names(prefix)
        known = self.tensors
        if all(f"{n}.weight" in known and f"{n}.qweight" not in known for n in names):
            return True
        excluded = [is_excluded(name, self.stored.modules_to_not_convert or ()) for name in names]
        if any(excluded) and not all(excluded):
            raise ValueError(
                f"{prefix}: vLLM computes {', '.join(names)} as one layer, but "
                "modules_to_not_convert lists some of them only. Quantize the model again with "
                "all or none of them."
            )
        return all(excluded)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Return how a layer is computed, or None for what vLLM computes as ever.

        Raises:
            ValueError: experts, or embeddings of input or output that are quantized.
        """
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if self.is_dense(prefix) else QALoRALinearMethod(self)
        if isinstance(layer, RoutedExperts):
            inside = [name for name in self.tensors if name.startswith(f"{prefix}.")]
            is_whole = bool(inside) and not any(name.endswith(".qweight") for name in inside)
            if is_whole or self.is_dense(prefix):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            raise ValueError(
                f"{prefix}: experts quantized by qalora are not served by vLLM yet. Experts in 16 "
                "bits have to be listed in config.json's modules_to_not_convert."
            )
        if isinstance(layer, VocabParallelEmbedding):
            last = prefix.rpartition(".")[2] + ".qweight"
            quantized = [name for name in self.tensors if f".{name}".endswith(f".{last}")]
            if quantized:
                raise ValueError(
                    f"{quantized[0]}: embeddings and an lm_head quantized by qalora are not served "
                    "by vLLM yet. Leave them in 16 bits."
                )
        return None


def register() -> None:
    """Make vLLM take checkpoints of ours; calling it again changes nothing."""
    register_quantization_config(QUANT_METHOD)(QALoRAVLLMConfig)
