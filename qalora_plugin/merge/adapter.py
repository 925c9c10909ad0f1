"""Read an adapter from adapter_config.json and adapter_model.safetensors alone; no model is built.

Two kinds of adapters are read. Ours (peft_type QALORA), and LoRA adapters that were trained with
pooling elsewhere (peft_type LORA, see `tuner.foreign`). Tensor names, as PEFT saves them, below
`base_model.model.`:

    <layer>.qalora_A.weight        [r, G]        <layer>.qalora_B.weight        [N, r]
    <layer>.qalora_scale_A.weight  [r, G]        <layer>.qalora_scale_B.weight  [N, r]
    <layer>.lora_A.weight          [r, K // p]   <layer>.lora_B.weight          [N, r]
    anything else                                whole tensors of modules_to_save, and embeddings
                                                 that PEFT finds resized
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open

from ..errors import AdapterError, ConfigError
from ..files.hub import resolve_model_dir
from ..files.json import read_json
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, CONFIG_FILE
from ..files.safetensors import TensorInfo, read_header
from ..tuner.config import QALoRAConfig
from ..tuner.names import ADAPT_PARTS, MATRICES
from .conventions import CONVENTIONS

PREFIX = "base_model.model."
QALORA, LORA = "QALORA", "LORA"
_AGAIN = "Config and tensors belong to two adapters, or are damaged: save or copy them again."

# (A, B) of each part, by peft_type and part
_TENSORS = {
    QALORA: MATRICES,
    LORA: {"zeros": ("lora_A", "lora_B")},
}
# LoRA's fields that say how large the change of a layer is
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# options of PEFT's LoRA that change what the adapter computes, or add tensors of their own
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
)


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted layer.

    Args:
        name: of the layer in the base model.
        keys: (key of A, key of B) of each part, "zeros" and "scales".
        rank: r.
        columns: of A.
        out_features: rows of B.
        scaling: lora_alpha / r, or / sqrt(r) with use_rslora.
    """

    name: str
    keys: dict[str, tuple[str, str]]
    rank: int
    columns: int
    out_features: int
    scaling: float


@dataclass
class Adapter:
    """An adapter directory, checked in itself; `open_adapter` makes one.

    Args:
        directory: where it lies.
        config: adapter_config.json.
        layers: the adapted layers by name in the base model.
        saved: keys of whole tensors (see `modules_to_save`) by tensor name in the base model.
        infos: dtype and shape of every tensor by key.
        renamed: name in the model that was trained by name in the base, see `rename`; empty where
            the two are the same.
    """

    directory: Path
    config: dict[str, Any]
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def rename(self, stored: Mapping[str, str]) -> None:
        """Take over the base's names.

        transformers gives other names to the tensors of some checkpoints: where the class lacks
        the head that they were saved with, or has one more, and in vision-language models.

        Args:
            stored: the base's name of each tensor by its name in the model that was trained; a
                layer's is that of its `weight`.
        """

        def layer_in_base(name: str) -> str:
            return stored.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

        self.layers = {
            layer_in_base(name): replace(layer, name=layer_in_base(name))
            for name, layer in self.layers.items()
        }
        self.saved = {stored.get(name, name): key for name, key in self.saved.items()}
        self.renamed = {base: trained for trained, base in stored.items()}

    def trained_tensor(self, name: str) -> str:
        """Name in the model that was trained of a tensor of the base."""
        return self.renamed.get(name, name)

    def trained_name(self, name: str) -> str:
        """Name in the model that was trained of a layer of the base."""
        return self.trained_tensor(f"{name}.weight").removesuffix(".weight")

    def asks_to_save(self, name: str) -> bool:
        """Whether modules_to_save selects a tensor of the base, by PEFT's rule: name endings."""
        *modules, _ = self.trained_tensor(name).split(".")
        owners = [".".join(modules[: i + 1]) for i in range(len(modules))]
        entries = tuple(self.config.get("modules_to_save") or ())
        return any(owner.endswith(entries) for owner in owners)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method: QALORA or LORA."""
        return str(self.config.get("peft_type"))

    @property
    def is_ours(self) -> bool:
        """Whether it was trained with QALoRAConfig: pools over the base's own groups."""
        return self.peft_type == QALORA

    @property
    def adapt(self) -> str:
        """What was learned: zeros, scales or both."""
        return str(self.config.get("adapt", "zeros"))

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return self.directory / ADAPTER_WEIGHTS_FILE

    def get(self, key: str) -> torch.Tensor:
        """One tensor, in its stored dtype."""
        with safe_open(self.weights, framework="pt") as file:
            return file.get_tensor(key)

    def get_pair(self, keys: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, columns] and B [N, r] of one part of a layer."""
        return self.get(keys[0]), self.get(keys[1])

    def sha256(self) -> str:
        """SHA-256 of the file of tensors."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def stated_convention(self) -> str | None:
        """The pooling convention that the adapter's own config states, None where it is silent."""
        if self.is_ours:
            return "sum"
        return "peft" if self.config.get("use_qalora") else None

    def convention(self, wanted: str = "auto") -> str:
        """The convention to use.

        Args:
            wanted: "auto", or one of `tuner.foreign.CONVENTIONS`.

        Raises:
            AdapterError: the adapter's config contradicts it, or neither states one.
        """
        if wanted not in ("auto", *CONVENTIONS):
            raise AdapterError(
                f"convention must be auto or one of {CONVENTIONS}, found {wanted!r}: leave it out "
                "for auto"
            )
        stated = self.stated_convention()
        if wanted == "auto" and stated is None:
            raise AdapterError(
                f"{self.directory / ADAPTER_CONFIG_FILE}: does not say how it pools (peft_type "
                f"{self.peft_type}, no use_qalora). Name the code that trained it with "
                "--convention: mean (the QA-LoRA authors' released code), peft (PEFT's "
                "use_qalora), or sum (the paper). A wrong one would corrupt the model silently."
            )
        if stated is not None and wanted not in ("auto", stated):
            raise AdapterError(
                f"{self.directory / ADAPTER_CONFIG_FILE}: was trained with the convention "
                f"{stated!r}, but {wanted!r} was asked for. Leave --convention out."
            )
        return stated if stated is not None else wanted

    def targets(self, name: str) -> bool:
        """Whether the config's target_modules and related fields select a layer of the base."""
        if not self.config.get("target_modules"):
            return name in self.layers
        if self.config["target_modules"] == "all-linear":
            return True
        fields = ("exclude_modules", "modules_to_save", "target_modules", "target_parameters")
        layers = ("layers_to_transform", "layers_pattern")
        config = SimpleNamespace(**{key: self.config.get(key) for key in fields + layers})
        return bool(check_target_module_exists(config, self.trained_name(name)))


def open_adapter(path: str | Path) -> Adapter:
    """Read and check an adapter directory; every tensor is read once.

    Args:
        path: a directory as PEFT saves it, or a Hub id.

    Raises:
        AdapterError: not an adapter, another PEFT method, an option that does not merge, half of
            a pair, a wrong shape, or a number that is not finite.
        CheckpointError: a damaged file.
    """
    directory = resolve_model_dir(path)
    adapter = Adapter(directory, _read_config(directory))
    if not adapter.weights.exists():
        raise AdapterError(_no_weights(directory))
    adapter.infos, _ = read_header(adapter.weights)
    _sort_keys(adapter)
    _check_finite(adapter)
    return adapter


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG_FILE
    if not path.exists():
        below = sorted(directory.glob(f"*/{ADAPTER_CONFIG_FILE}"))
        found = "a model, not an adapter" if (directory / CONFIG_FILE).exists() else "no adapter"
        raise AdapterError(
            f"{directory}: no {ADAPTER_CONFIG_FILE}: this is {found}. "
            + (
                f"Did you mean {below[0].parent}?"
                if below
                else "Give the directory that the adapter was saved in."
            )
        )
    config = read_json(path)
    if config.get("peft_type") not in _TENSORS:
        raise AdapterError(
            f"{path}: expected peft_type QALORA, or LORA trained with pooling, found "
            f"{config.get('peft_type')!r}. Other adapters do not merge into integers."
        )
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise AdapterError(
            f"{path}: trained with {', '.join(used)}, which a merge into offsets and scales "
            "cannot hold. Train without."
        )
    if config.get("adapt", "zeros") not in ADAPT_PARTS:
        raise AdapterError(
            f"{path}: adapt must be one of {sorted(ADAPT_PARTS)}, found {config['adapt']!r}. "
            f"{_AGAIN}"
        )
    return config


def _no_weights(directory: Path) -> str:
    start = f"{directory}: no {ADAPTER_WEIGHTS_FILE}"
    if (directory / "adapter_model.bin").exists():
        return (
            f"{start}, only adapter_model.bin, a pickle, which can run code and is never read. "
            "Convert it in an environment that you trust: safetensors.torch.save_file("
            "torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')."
        )
    return f"{start}. Was training stopped before the adapter was saved?"


def _sort_keys(adapter: Adapter) -> None:
    """Fill `layers` and `saved` from the keys, checking pairs and shapes."""
    tensors = _TENSORS[adapter.peft_type]
    matrix_names = {name: part for part, pair in tensors.items() for name in pair}
    found: dict[str, set[str]] = {}
    for key in adapter.infos:
        if not key.startswith(PREFIX):
            raise AdapterError(
                f"{adapter.weights}: key {key}: expected names that start with {PREFIX}. "
                "Save the adapter with PeftModel.save_pretrained."
            )
        module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        layer, _, matrix = module.rpartition(".")
        if leaf == "weight" and matrix in matrix_names:
            found.setdefault(layer, set()).add(matrix)
        elif not _is_repeated(adapter, key):
            adapter.saved[key.removeprefix(PREFIX)] = key
    if not found:
        raise AdapterError(
            f"{adapter.weights}: no {' or '.join(matrix_names)} in it: nothing to merge. {_AGAIN}"
        )
    scaling = _scaling_config(adapter)
    for layer in found:
        adapter.layers[layer] = _layer(adapter, layer, found[layer], scaling)


def _is_repeated(adapter: Adapter, key: str) -> bool:
    """Whether PEFT, saving resized embeddings, wrote a tensor under its wrapper's name too."""
    wrappers = (".modules_to_save.", ".original_module.")
    return any(w in key and key.replace(w, ".") in adapter.infos for w in wrappers)


def _scaling_config(adapter: Adapter) -> QALoRAConfig:
    """The fields that ours and LoRA's config have in common, checked."""
    config = adapter.config
    for key in ("r", "lora_alpha"):
        if config.get(key) is None:
            raise AdapterError(
                f"{adapter.directory / ADAPTER_CONFIG_FILE}: does not say {key}. Add it."
            )
    try:
        return QALoRAConfig(**{key: config[key] for key in _SCALING if config.get(key) is not None})
    except ConfigError as error:
        raise AdapterError(f"{adapter.directory / ADAPTER_CONFIG_FILE}: {error}") from error


def _layer(
    adapter: Adapter, name: str, found: set[str], scaling_config: QALoRAConfig
) -> AdapterLayer:
    names = {part: _TENSORS[adapter.peft_type][part] for part in ADAPT_PARTS[adapter.adapt]}
    expected = {matrix for pair in names.values() for matrix in pair}
    for what, lost in (("missing", expected - found), ("extra", found - expected)):
        if lost:
            key = f"{PREFIX}{name}.{sorted(lost)[0]}.weight"
            raise AdapterError(
                f"{adapter.weights}: {what} key {key} (adapt={adapter.adapt!r} has "
                f"{', '.join(sorted(expected))} in every layer). {_AGAIN}"
            )
    keys = {
        part: (f"{PREFIX}{name}.{a}.weight", f"{PREFIX}{name}.{b}.weight")
        for part, (a, b) in names.items()
    }
    rank, scaling = scaling_config.rank_and_scaling(name)
    shapes = {key: adapter.infos[key].shape for pair in keys.values() for key in pair}
    columns = out_features = 0
    for a, b in keys.values():
        if len(shapes[a]) != 2 or shapes[a][0] != rank or shapes[a][1] < 1:
            raise AdapterError(
                f"{adapter.weights}: {a}: expected [{rank}, groups] (rank {rank}), "
                f"found {list(shapes[a])}. {_AGAIN}"
            )
        if len(shapes[b]) != 2 or shapes[b][1] != rank:
            raise AdapterError(
                f"{adapter.weights}: {b}: expected [out_features, {rank}] (rank {rank}), "
                f"found {list(shapes[b])}. {_AGAIN}"
            )
        if columns and (columns, out_features) != (shapes[a][1], shapes[b][0]):
            raise AdapterError(
                f"{adapter.weights}: {a}: its parts differ in shape: {shapes}. {_AGAIN}"
            )
        columns, out_features = shapes[a][1], shapes[b][0]
    return AdapterLayer(name, keys, rank, columns, out_features, scaling)


def _check_finite(adapter: Adapter) -> None:
    for key in adapter.infos:
        tensor = adapter.get(key)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{adapter.weights}: {key} holds NaN or infinity: training diverged. "
                "Use an earlier checkpoint, or a lower learning rate."
            )
