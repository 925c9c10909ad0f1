"""Read an adapter, from its config and its tensors alone, and open its base; no model is built.

Two kinds of adapters are read. Ours (peft_type QALORA), and LoRA adapters that were trained with
pooling elsewhere (peft_type LORA, see `conventions`). Tensor names, as PEFT saves them, below
`base_model.model.`:

    <layer>.<A of MATRICES>.weight  [r, G]        <layer>.<B of MATRICES>.weight  [N, r]
    <layer>.lora_A.weight           [r, K // p]   <layer>.lora_B.weight           [N, r]
    anything else                                 whole tensors of modules_to_save, and embeddings
                                                  that PEFT finds resized
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.adapter_values import check_adapter_values
from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.kind import find_kind, find_model
from ..errors import AdapterError, CheckpointError, ConfigError
from ..files.hub import locate, resolve_model_dir
from ..files.manifest import check_manifest
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, CONFIG_FILE
from ..files.reader import CheckpointReader
from ..files.schemas import AdapterConfig, read_as
from ..tuner.config import PEFT_TYPE
from ..tuner.names import ADAPT_PARTS, MATRICES
from ..tuner.scaling import SCALING_FIELDS, check_scaling, rank_and_scaling
from ..tuner.selecting import is_selected
from .conventions import CONVENTIONS

PREFIX = "base_model.model."
_AGAIN = "Config and tensors belong to two adapters, or are damaged: save or copy them again."

# (A, B) of each part, by peft_type and part
_MATRICES = {PEFT_TYPE: MATRICES, "LORA": {"zeros": ("lora_A", "lora_B")}}
_WRAPPERS = (".modules_to_save.", ".original_module.")
# options of PEFT's LoRA that change what the adapter computes, or add tensors of their own
_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "fan_in_fan_out",
    "layer_replication", "lora_bias", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterLayer:
    """One adapted layer, as the adapter's config and headers describe it.

    Args:
        keys: (key of A, key of B) of each part, "zeros" and "scales".
        rank: r.
        columns: of A.
        out_features: rows of B.
        scaling: lora_alpha / r, or / sqrt(r) with use_rslora.
    """

    keys: dict[str, tuple[str, str]]
    rank: int
    columns: int
    out_features: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter directory, checked in itself; `open_adapter` makes one.

    Names are those of the model that was trained; `names.TrainedModel` knows the base's.

    Args:
        reader: of the file of tensors.
        config: adapter_config.json.
        layers: the adapted layers by name.
        saved: keys of whole tensors (see `modules_to_save`) by tensor name.
    """

    reader: CheckpointReader
    config: Mapping[str, Any]
    layers: Mapping[str, AdapterLayer] = field(default_factory=dict)
    saved: Mapping[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """The directory that was read."""
        return self.reader.directory

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method: QALORA or LORA."""
        return str(self.config["peft_type"])

    @property
    def is_ours(self) -> bool:
        """True if it was trained with QALoRAConfig: it pools over the base's own groups."""
        return self.peft_type == PEFT_TYPE

    @property
    def adapt(self) -> str:
        """The part that was learned: zeros, scales or both."""
        return str(self.config.get("adapt", "zeros"))

    def error(self, text: str) -> AdapterError:
        """Return an error that names the file of tensors."""
        return AdapterError(f"{self.reader.files[0]}: {text}")

    def config_error(self, text: str) -> AdapterError:
        """Return an error that names adapter_config.json."""
        return AdapterError(f"{self.directory / ADAPTER_CONFIG_FILE}: {text}")

    def get(self, key: str) -> torch.Tensor:
        """Read one tensor, in its stored dtype."""
        return self.reader.get(key)

    def get_pair(self, keys: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read A [r, columns] and B [N, r] of one part of a layer."""
        return self.get(keys[0]), self.get(keys[1])

    def stated_convention(self) -> str | None:
        """Return the pooling convention that the config states, None where it is silent.

        Raises:
            AdapterError: it states one that its kind of adapter does not have, or two.
        """
        written = self.config.get("convention")
        known = "sum" if self.is_ours else "peft" if self.config.get("use_qalora") else None
        if written is not None and (written not in CONVENTIONS or written != (known or written)):
            expected = repr(known) if known else f"one of {CONVENTIONS}"
            raise self.config_error(f"convention: expected {expected}, found {written!r}. {_AGAIN}")
        return known or written

    def convention(self, wanted: str = "auto") -> str:
        """Return the convention to merge with; `wanted` is "auto" or one of `CONVENTIONS`.

        Raises:
            AdapterError: the adapter's config contradicts it, or neither states one.
        """
        if wanted not in ("auto", *CONVENTIONS):
            raise AdapterError(
                f"convention must be auto or one of {CONVENTIONS}, found {wanted!r}: leave it out "
                "for auto"
            )
        stated = self.stated_convention()
        if stated is None and wanted == "auto":
            raise self.config_error(
                f"does not say how it pools (peft_type {self.peft_type}, no use_qalora). Name the "
                "code that trained it with --convention: mean (the QA-LoRA authors' released "
                "code), peft (PEFT's use_qalora), or sum (the paper). A wrong one would corrupt "
                "the model silently."
            )
        if stated is not None and wanted not in ("auto", stated):
            raise self.config_error(
                f"was trained with the convention {stated!r}, but {wanted!r} was asked for. Leave "
                "--convention out."
            )
        return stated or wanted

    def targets(self, layer: str) -> bool:
        """Say whether target_modules and related fields of the config select a layer."""
        if not self.config.get("target_modules"):
            return layer in self.layers
        if self.config["target_modules"] == "all-linear":
            return True
        try:
            return is_selected(self.config, layer)
        except ConfigError as error:
            raise self.config_error(f"{error}.") from error

    def asks_to_save(self, tensor: str) -> bool:
        """Say whether modules_to_save selects a tensor, by PEFT's rule: name endings."""
        parts, entries = tensor.split("."), tuple(self.config.get("modules_to_save") or ())
        return any(".".join(parts[:i]).endswith(entries) for i in range(1, len(parts)))


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
    config = _read_config(directory)
    check_manifest(directory)
    if not (directory / ADAPTER_WEIGHTS_FILE).exists():
        found = ". Was training stopped before the adapter was saved?"
        if (directory / "adapter_model.bin").exists():
            found = (
                ", only adapter_model.bin, a pickle, which can run code and is never read. Convert "
                "it in an environment that you trust: safetensors.torch.save_file(torch.load("
                f"'adapter_model.bin', weights_only=True), '{ADAPTER_WEIGHTS_FILE}')."
            )
        raise AdapterError(f"{directory}: no {ADAPTER_WEIGHTS_FILE}{found}")
    adapter = Adapter(CheckpointReader(directory, only=ADAPTER_WEIGHTS_FILE), config)
    matrices, saved = _sort_keys(adapter)
    layers = {name: _layer(adapter, name, found) for name, found in matrices.items()}
    check_adapter_values(adapter.reader)
    return replace(adapter, layers=layers, saved=saved)


def open_base(
    adapter: Adapter, base: str | Path | None, *, check_hashes: bool = True
) -> QuantizedCheckpoint:
    """Open the base, all its headers checked: `base`, or by default what the config names.

    Hashes are compared as `open_quantized` says.

    Raises:
        AdapterError: the config names no base, one that cannot be opened, or one of 16 bits.
        CheckpointError: the base is damaged or not quantized.
    """
    stored = adapter.config.get("base_model_name_or_path")
    if not base and not stored:
        raise adapter.config_error(
            "base_model_name_or_path is empty. Name the quantized base with --base."
        )
    found = base or locate(str(stored), adapter.directory)
    try:
        directory = find_model(found, None if base else adapter.config.get("revision"))
    except CheckpointError as error:
        if base:
            raise
        raise adapter.config_error(
            f"its base_model_name_or_path cannot be opened, and no directory beside or above the "
            f"adapter has it. {error} If the quantized base is elsewhere, name it with --base."
        ) from error
    if adapter.is_ours and find_kind(directory).is_16_bit:
        bits, group_size = (adapter.config.get(key) for key in ("bits", "group_size"))
        raise AdapterError(
            f"{directory}: is a 16-bit model, which was quantized while it was loaded for "
            f"training. Write its integers down first: `qalora quantize {found} --out DIR "
            f"--method rtn --bits {bits} --group-size {group_size}` (and --offsets-at minimum "
            "where it was loaded so), then merge with --base DIR; the fingerprint in "
            f"{adapter.directory / ADAPTER_CONFIG_FILE} shows whether they are the same. "
            "(MergeCallback takes them from memory.)"
        )
    return open_quantized(directory, check_hashes=check_hashes)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG_FILE
    if not path.exists():
        below = sorted(directory.glob(f"*/{ADAPTER_CONFIG_FILE}"))
        found = "a model, not an adapter" if (directory / CONFIG_FILE).exists() else "no adapter"
        saved = "Give the directory that the adapter was saved in."
        advice = f"Did you mean {below[0].parent}?" if below else saved
        raise AdapterError(f"{directory}: no {ADAPTER_CONFIG_FILE}: this is {found}. {advice}")
    config = read_as(path, AdapterConfig, error=AdapterError)
    if config.get("peft_type") not in _MATRICES:
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
    known = _MATRICES[config["peft_type"]].keys()
    modes = sorted(mode for mode, parts in ADAPT_PARTS.items() if known >= {*parts})
    size = config.get("qalora_group_size")
    for key, valid, expected in (
        ("adapt", config.get("adapt", "zeros") in modes, f"one of {modes}"),
        ("qalora_group_size", size is None or size > 0, "a positive integer"),
    ):
        if not valid:
            raise AdapterError(f"{path}: {key} must be {expected}, found {config[key]!r}. {_AGAIN}")
    check_scaling(config, str(path), AdapterError)
    return config


def _sort_keys(adapter: Adapter) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return the names of the matrices by layer, and the keys of whole tensors by name."""
    known = [matrix for pair in _MATRICES[adapter.peft_type].values() for matrix in pair]
    matrices: dict[str, set[str]] = {}
    saved: dict[str, str] = {}
    for key in adapter.reader.tensors:
        if not key.startswith(PREFIX):
            raise adapter.error(
                f"key {key}: expected names that start with {PREFIX}. Save the adapter with "
                "PeftModel.save_pretrained."
            )
        module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        layer, _, matrix = module.rpartition(".")
        if leaf == "weight" and matrix in known:
            matrices.setdefault(layer, set()).add(matrix)
        # PEFT, saving resized embeddings, writes them under its wrapper's names too
        elif not any(w in key and key.replace(w, ".") in adapter.reader for w in _WRAPPERS):
            saved[key.removeprefix(PREFIX)] = key
    if not matrices:
        raise adapter.error(f"no {' or '.join(known)} in it: nothing to merge. {_AGAIN}")
    return matrices, saved


def _layer(adapter: Adapter, name: str, found: set[str]) -> AdapterLayer:
    """Return one layer; all matrices that `adapt` names are there, and fit each other."""
    pairs = {part: _MATRICES[adapter.peft_type][part] for part in ADAPT_PARTS[adapter.adapt]}
    expected = {matrix for pair in pairs.values() for matrix in pair}
    for what, wrong in (("missing", expected - found), ("extra", found - expected)):
        if wrong:
            raise adapter.error(
                f"{what} key {PREFIX}{name}.{sorted(wrong)[0]}.weight (adapt={adapter.adapt!r} has "
                f"{', '.join(sorted(expected))} in every layer). {_AGAIN}"
            )
    settings = {field: adapter.config[field] for field in SCALING_FIELDS if field in adapter.config}
    try:
        rank, factor = rank_and_scaling(name, **settings)
    except ConfigError as error:
        raise adapter.config_error(f"{error}.") from error
    keys, sizes = {}, set()
    for part, (a, b) in pairs.items():
        keys[part] = (f"{PREFIX}{name}.{a}.weight", f"{PREFIX}{name}.{b}.weight")
        shapes = [adapter.reader.info(key).shape for key in keys[part]]
        wanted = (f"[{rank}, groups]", f"[out_features, {rank}]")
        for axis, (key, shape) in enumerate(zip(keys[part], shapes, strict=True)):
            if len(shape) != 2 or shape[axis] != rank or 0 in shape:
                raise adapter.error(
                    f"{key}: expected {wanted[axis]} (rank {rank}), found {list(shape)}. {_AGAIN}"
                )
        sizes.add((shapes[0][1], shapes[1][0]))
    if len(sizes) > 1:
        raise adapter.error(
            f"{keys['scales'][0]}: its parts differ in shape: {sorted(sizes)}. {_AGAIN}"
        )
    return AdapterLayer(keys, rank, *sizes.pop(), scaling=factor)
