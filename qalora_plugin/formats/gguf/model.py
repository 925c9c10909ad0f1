"""config.json of a GGUF file, and the names of its tensors in that model, from its metadata."""

from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ...architecture.model import empty_model
from ...architecture.selection import linears_in_blocks
from ...errors import CheckpointError, QALoRAError
from . import FORMAT
from .headers import MODEL_TYPES, model_class
from .metadata import ARCHITECTURES, Architecture, llama3_factors

ROPE_FACTORS = "rope_freqs.weight"
_WIDE_GEMMAS = {"gemma2": 46, "gemma3": 62}  # layers of those that scale queries otherwise
_LOCAL_ROPE = 10000.0  # of Gemma 3's sliding layers, where the file does not say
# rope_freqs.weight of Llama 3.1 and 3.3 (factor 8), and of 3.2 (factor 32)
_ROPE_DEFAULTS = {  # of rope.scaling.*, of which no other values are read
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Model:
    """The model that a GGUF file holds.

    Attributes:
        config: config.json.
        architecture: its record.
        names: {name in Hugging Face's model: name in the file}, in the order of the file.
        linears: names of the linear layers in the model's blocks.
    """

    def __init__(
        self, path: Path, family: str, fields: dict[str, Any], tensors: dict[str, Any]
    ) -> None:
        """Rebuild it from the file's key-values and tensors; `family` is one of `MODEL_TYPES`.

        Raises:
            CheckpointError: a setting or a tensor that is not read, or a tensor that is missing.
        """
        self._path, self._family, self._fields, self._tensors = path, family, fields, tensors
        model_type = MODEL_TYPES[family]
        self.architecture: Architecture = ARCHITECTURES[model_type]
        try:
            self.config = self._config(model_type)
            self.names, self.linears = self._find_names()
        except QALoRAError:
            raise
        except Exception as error:  # of transformers' code, which trusts a config
            raise CheckpointError(
                f"{path}: its key-values describe no {family} model that transformers can build "
                f"({type(error).__name__}: {' '.join(str(error).split()):.200}). Download or copy "
                "it again."
            ) from error

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"{self._family}.{key}", default)

    def _need(self, key: str) -> Any:
        value = self._get(key)
        if value is None or isinstance(value, list):
            raise CheckpointError(
                f"{self._path}: {self._family}.{key}: expected one number, found "
                f"{'a list of them' if value else 'nothing'}: this variant of the architecture is "
                "not read. Quantize the 16-bit model with `qalora quantize`."
            )
        return value

    def _config(self, model_type: str) -> dict[str, Any]:
        heads = self._need("attention.head_count")
        head_dim = self._get("attention.key_length") or self._need("embedding_length") // heads
        rotary = self._get("rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise CheckpointError(
                f"{self._path}: {self._family}.rope.dimension_count is {rotary}, of heads of "
                f"{head_dim}: a partial rotary embedding is not read."
            )
        blocks, count = self._need("block_count"), len(self._tensors)
        if not 0 < blocks <= count:
            raise CheckpointError(
                f"{self._path}: {self._family}.block_count: expected at most the number of its "
                f"tensors, {count}, found {blocks}. The file is damaged: download it again."
            )
        context = self._need("context_length")
        wanted: dict[str, Any] = {
            "hidden_size": self._need("embedding_length"),
            "num_hidden_layers": blocks,
            "intermediate_size": self._need("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _short(self._need("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": context,
            "vocab_size": int(self._shape("token_embd.weight")[0]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "rope_parameters": self._rope(context),
            "dtype": "float32",  # what is not integers is read exactly
        }
        if self._family == "llama":
            wanted["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
        if self._family in _WIDE_GEMMAS:
            wanted |= self._gemma(head_dim, heads)
        for key in ("bos", "eos", "padding"):
            found = self._fields.get(f"tokenizer.ggml.{key}_token_id")
            wanted[f"{key.removesuffix('ding')}_token_id"] = found
        made = CONFIG_MAPPING[model_type](**wanted).to_diff_dict()
        made["architectures"] = [model_class(model_type)]
        return made | wanted | {"model_type": model_type}

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape as Hugging Face has it; gguf-py lists the fastest axis first."""
        if name not in self._tensors:
            raise CheckpointError(f"{self._path}: no tensor {name}. The file is incomplete.")
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def _rope(self, context: int) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self._get("rope.freq_base")}
        rope["rope_theta"] = float(rope["rope_theta"] or 10000.0)
        factor = self._get("rope.scaling.factor") or self._get("rope.scale_linear")  # its old name
        # llama.cpp takes a factor without a type for that of linear scaling
        kind = self._get("rope.scaling.type", "linear" if factor else "none")
        for name, default in _ROPE_DEFAULTS.items():
            found = self._get(f"rope.scaling.{name}", default)
            if found != default:
                raise CheckpointError(
                    f"{self._path}: {self._family}.rope.scaling.{name} is {found}: of this key "
                    f"only {default} is read."
                )
        if ROPE_FACTORS in self._tensors and kind != "none":
            raise CheckpointError(
                f"{self._path}: {self._family}.rope.scaling.type is {kind!r} beside the tensor "
                f"{ROPE_FACTORS}: two position encodings at once are not read."
            )
        if ROPE_FACTORS in self._tensors:
            rope |= {"rope_type": "llama3", **_LLAMA3}
        elif kind in ("linear", "yarn"):
            rope |= {
                "rope_type": kind,
                "factor": float(factor or self._need("rope.scaling.factor")),
            }
        elif kind != "none":
            raise CheckpointError(
                f"{self._path}: {self._family}.rope.scaling.type {kind!r} is not read; linear, "
                "yarn and Llama 3's are."
            )
        if kind == "yarn":
            original = self._get("rope.scaling.original_context_length", context)
            rope["original_max_position_embeddings"] = original
        if self._family != "gemma3":
            return rope
        local = {"rope_type": "default", "rope_theta": self._get("rope.freq_base_swa", _LOCAL_ROPE)}
        return {"full_attention": rope, "sliding_attention": local}

    def set_rope_factors(self, factors: torch.Tensor) -> None:
        """Find Llama 3's stretch of frequencies, fp32 [head_dim / 2], among those that are known.

        Raises:
            CheckpointError: it is another one.
        """
        rope = self.config["rope_parameters"]
        for factor in (8.0, 32.0, 4.0, 16.0, 64.0):
            tried = rope | {"factor": factor}
            if torch.allclose(llama3_factors(tried, self.config["head_dim"]), factors, rtol=1e-5):
                rope["factor"] = factor
                return
        raise CheckpointError(
            f"{self._path}: {ROPE_FACTORS} are not the factors of Llama 3.1, 3.2 or 3.3: this "
            "position encoding is not read."
        )

    def _gemma(self, head_dim: int, heads: int) -> dict[str, Any]:
        more: dict[str, Any] = {"query_pre_attn_scalar": head_dim}
        if self._need("block_count") == _WIDE_GEMMAS[self._family]:  # the 27B of each
            more["query_pre_attn_scalar"] = self._need("embedding_length") // heads
        if self._family == "gemma3" or self._get("attention.sliding_window"):
            more["sliding_window"] = self._need("attention.sliding_window")  # Gemma 2 has a default
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if self._get(key) is not None:
                more[key] = float(self._get(key))
        return more

    def _find_names(self) -> tuple[dict[str, str], set[str]]:
        gguf = FORMAT.library("gguf")
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self._family)
        table = gguf.get_tensor_name_map(kind, self.config["num_hidden_layers"])
        config = CONFIG_MAPPING[self.config["model_type"]].from_dict(self.config)
        model = empty_model(config, self.config["architectures"][0])
        tied = set(model.all_tied_weights_keys)
        wanted = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in tied:
                continue
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None or found not in self._tensors:
                raise CheckpointError(
                    f"{self._path}: no tensor {found or name} for {name}. The file is incomplete, "
                    "or another variant of the architecture, which is not read."
                )
            if self._shape(found) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{self._path}: {found}: expected shape {list(parameter.shape)}, found "
                    f"{list(self._shape(found))}. The file's metadata and tensors differ."
                )
            wanted[found] = name
        unknown = self._tensors.keys() - wanted.keys() - {ROPE_FACTORS}
        if unknown:
            raise CheckpointError(
                f"{self._path}: {sorted(unknown)[0]} ({len(unknown)} such) has no place in "
                f"{type(model).__name__}: this variant of the architecture is not read."
            )
        names = {wanted[name]: name for name in self._tensors if name in wanted}
        return names, set(linears_in_blocks(model))


def _short(value: float) -> float:
    """Return the shortest decimal that is this fp32 number: 1e-05 instead of 9.99999974e-06."""
    return float(f"{value:.6g}")
