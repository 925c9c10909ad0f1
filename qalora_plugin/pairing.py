"""Fit an adapter to a quantized base: every reason not to merge is found here, from headers."""

from dataclasses import dataclass, replace
from typing import Any

import transformers

from qalora_kernels import LowRank, PackedWeight, QuantSpec

from .adapter import CONFIG_FILE, Adapter, AdapterLayer
from .checkpoint.architecture import Architecture, auto_class_names, read_architecture
from .checkpoint.base import LayerTensors, QuantizedCheckpoint
from .errors import AdapterError
from .quant.fingerprint import fingerprint
from .tuner.foreign import Regrouping, convention_factor, pool_size_of, regroup

# by PEFT's task types
_AUTO_CLASSES: dict[Any, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


@dataclass(frozen=True)
class LayerMerge:
    """How one adapted layer is merged.

    Args:
        layer: the adapter's part.
        spec: the base's grid.
        merged_spec: the grid after merging: a smaller group_size where groups are split.
        regrouping: from the base's groups and A's columns to the merged groups.
        pool_size: inputs that the adapter pools into one feature.
        factor: LoRA's scaling times the convention's factor.
    """

    layer: AdapterLayer
    spec: QuantSpec
    merged_spec: QuantSpec
    regrouping: Regrouping
    pool_size: int
    factor: float

    def change(self, adapter: Adapter, part: str) -> LowRank | None:
        """Return factor * (B A)^T of "zeros" or "scales", of the merged groups."""
        if part not in self.layer.keys:
            return None
        a, b = adapter.get_pair(self.layer.keys[part])
        return LowRank(self.regrouping.spread(a), b, self.factor)

    def fold(self, adapter: Adapter, tensors: LayerTensors) -> LayerTensors:
        """The merged layer: the integers and g_idx as they are, scales and offsets folded."""
        grid = [self.regrouping.split(values) for values in (tensors.scales, tensors.offsets)]
        weight = PackedWeight(tensors.qweight, *grid, tensors.g_idx, self.merged_spec)
        merged = weight.fold(self.change(adapter, "zeros"), self.change(adapter, "scales"))
        return LayerTensors(*merged.tensors)


def pair(adapter: Adapter, base: QuantizedCheckpoint, convention: str) -> dict[str, LayerMerge]:
    """Fit every layer of the adapter to the base.

    Args:
        adapter: the adapter.
        base: the base it was trained on.
        convention: one of `tuner.foreign.CONVENTIONS`.

    Returns:
        One entry for every adapted layer, by name.

    Raises:
        AdapterError: the adapter belongs to another base, lacks a layer, has one that the base
            has not, or pools over inputs that no offset is common to.
    """
    if not any(name in base.layers for name in adapter.layers):
        architecture = trained_architecture(adapter, base)
        if architecture is not None:
            adapter.rename(architecture.stored)
    for name in adapter.layers:
        if name not in base.layers:
            raise AdapterError(
                f"{adapter.weights}: adapts {name}, which is not a quantized layer of "
                f"{base.directory}. It was trained on another base."
            )
    check_base(adapter, base)
    for name in base.layers:
        if name not in adapter.layers and adapter.targets(name):
            raise AdapterError(
                f"{adapter.weights}: missing keys: none for {name}, which target_modules in "
                f"{CONFIG_FILE} selects. The file is incomplete, or of another base."
            )
    return {
        name: _pair_layer(adapter, layer, base, convention)
        for name, layer in adapter.layers.items()
    }


def trained_architecture(adapter: Adapter, base: QuantizedCheckpoint) -> Architecture | None:
    """The model that was trained, by the class that the adapter's config or the base's names.

    Returns:
        None where transformers knows no class in which the adapter's layers exist.
    """
    for name in _class_names(adapter, base):
        architecture = read_architecture(base, name)
        if architecture is not None and all(
            f"{adapter.trained_name(layer)}.weight" in architecture.stored
            for layer in adapter.layers
        ):
            return architecture
    return None


def _class_names(adapter: Adapter, base: QuantizedCheckpoint) -> list[str]:
    """Model classes to try, the likeliest first."""
    names = [(adapter.config.get("auto_mapping") or {}).get("base_model_class")]
    saved_from = base.reader.config.get("architectures") or []
    auto_class = _AUTO_CLASSES.get(adapter.config.get("task_type"))
    fitting: list[str] = []
    if auto_class is not None:
        fitting = auto_class_names(auto_class, base.reader.config.get("model_type"))
    if not set(saved_from).isdisjoint(fitting) or adapter.config.get("task_type") == "CAUSAL_LM":
        names += [*saved_from, *fitting]
    else:
        names += [*fitting, *saved_from]
    return [name for name in dict.fromkeys(names) if name]


def check_base(adapter: Adapter, base: QuantizedCheckpoint) -> None:
    """Check that the adapter was trained on this base.

    Raises:
        AdapterError: the base has something merged in already, or other bits, group size or
            integers than the adapter's base.
    """
    where = adapter.directory / CONFIG_FILE
    if base.config.merged != adapter.config.get("base_merged"):
        merged = base.config.merged or {}
        raise AdapterError(
            f"{base.directory}: already merged (with {merged.get('adapter')!r}), and the adapter "
            "was not trained on that. Merge into the base it was trained on: --base names it."
            if merged
            else f"{base.directory}: the adapter was trained on a base with something merged into "
            f"it ({adapter.config['base_merged'].get('adapter')!r}), this one has nothing. "
            "Name that base with --base."
        )
    if not adapter.is_ours:
        return
    for key in ("bits", "group_size"):
        stated, found = adapter.config.get(key), getattr(base.config, key)
        if stated is not None and stated != found:
            raise AdapterError(
                f"{where}: {key} is {stated}, that of {base.directory} is {found}: the adapter "
                "was trained on another base. Name the right one with --base."
            )
    stated = adapter.config.get("fingerprint")
    if stated is None:
        return
    found = base.config.base.get("fingerprint") or fingerprint(
        (adapter.trained_name(name), base.reader.get(f"{name}.qweight")) for name in base.layers
    )
    if stated != found:
        raise AdapterError(
            f"{where}: was trained on integers with the fingerprint {stated}, those of "
            f"{base.directory} have {found}. It is another base, or it was quantized again with "
            "other settings: name the directory that the adapter was trained on with --base."
        )


def _pair_layer(
    adapter: Adapter, layer: AdapterLayer, base: QuantizedCheckpoint, convention: str
) -> LayerMerge:
    name, spec = layer.name, base.layers[layer.name]
    if layer.out_features != spec.out_features:
        raise AdapterError(
            f"{adapter.weights}: {name}: B has {layer.out_features} rows, the base's layer "
            f"{spec.out_features} outputs. It was trained on another base."
        )
    if adapter.is_ours:
        if layer.columns != spec.num_groups:
            raise AdapterError(
                f"{adapter.weights}: {name}: A has {layer.columns} columns, the base's layer "
                f"{spec.num_groups} groups. It was trained on another base or group size."
            )
        same = Regrouping(spec.group_size)
        return LayerMerge(layer, spec, spec, same, spec.group_size, layer.scaling)
    stated = adapter.config.get("qalora_group_size") if adapter.config.get("use_qalora") else None
    pool_size = pool_size_of(name, layer.columns, spec, stated)
    g_idx = base.reader.get(f"{name}.g_idx") if base.config.desc_act else None
    regrouping = regroup(name, spec, g_idx, pool_size)
    return LayerMerge(
        layer,
        spec,
        replace(spec, group_size=regrouping.group_size),
        regrouping,
        pool_size,
        layer.scaling * convention_factor(convention, pool_size, spec.in_features),
    )
