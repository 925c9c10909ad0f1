"""Fit the layers of an adapter to a quantized base: one fold a layer, checked from headers."""

from dataclasses import dataclass, replace

from qalora_kernels import LowRank, PackedWeight, QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.fingerprint import fingerprints, summary
from ..checkpoint.identity import BaseIdentity
from ..errors import AdapterError
from ..files.names import ADAPTER_CONFIG_FILE
from .adapter import Adapter, AdapterLayer
from .conventions import Regrouping, convention_factor, pool_size_of, regroup
from .names import TrainedModel


@dataclass(frozen=True)
class LayerMerge:
    """The merge of one adapted layer.

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
        """Return the change of the G' merged groups by "zeros" or "scales"; None if not adapted."""
        if part not in self.layer.keys:
            return None
        a, b = adapter.get_pair(self.layer.keys[part])
        return LowRank(self.regrouping.spread(a), b, self.factor)

    def fold(self, adapter: Adapter, weight: PackedWeight) -> PackedWeight:
        """Return the merged layer: integers and g_idx as they are, scales and offsets folded."""
        grid = replace(
            weight,
            scales=self.regrouping.split(weight.scales),
            offsets=self.regrouping.split(weight.offsets),
            spec=self.merged_spec,
        )
        return grid.fold(self.change(adapter, "zeros"), self.change(adapter, "scales"))


def pair(
    adapter: Adapter, base: QuantizedCheckpoint, trained: TrainedModel, convention: str
) -> dict[str, LayerMerge]:
    """Fit every layer of the adapter to the base; returns the folds by name in the base.

    Raises:
        AdapterError: the adapter belongs to another base, lacks a layer, has one that the base
            has not, or pools over inputs that no offset is common to.
    """
    layers = {trained.in_base(name): layer for name, layer in adapter.layers.items()}
    for name in layers:
        if name not in base.layers:
            raise adapter.error(
                f"adapts {name}, which is not a quantized layer of {base.directory}. It was "
                "trained on another base."
            )
    _check_base(adapter, base, trained)
    for name in base.layers:
        if name not in layers and adapter.targets(trained.in_model(name)):
            raise adapter.error(
                f"missing keys: none for {name}, which target_modules in {ADAPTER_CONFIG_FILE} "
                "selects. The file is incomplete, or of another base."
            )
    return {
        name: _pair_layer(adapter, base, name, layer, convention) for name, layer in layers.items()
    }


def _check_base(adapter: Adapter, base: QuantizedCheckpoint, trained: TrainedModel) -> None:
    """Check that the adapter was trained on this base; one from elsewhere knows of none."""
    stated = adapter.config if adapter.is_ours else {}
    grid = (stated.get("bits"), stated.get("group_size"))
    before = adapter.config.get("base_merged"), stated.get("base_refined")
    wanted = BaseIdentity(*grid, stated.get("fingerprint"), *before)
    marks: list[str] = []
    if adapter.is_ours:
        summaries = {name: summary(base.qweight(name)) for name in base.layers}
        marks = fingerprints(summaries, trained.in_model, str)
        if wanted.fingerprint is None:
            raise adapter.config_error(
                f"fingerprint: expected that of the base's integers, found none: nothing shows "
                f"that the adapter was trained on {base.directory}. If you know it, enter its "
                f"fingerprint there: {marks[0]}"
            )
    grid, mark = (base.config.bits, base.config.group_size), next(iter(marks), None)
    refined = base.config.base.get("refined") if adapter.is_ours else None
    found = BaseIdentity(*grid, mark, base.config.merged, refined, tuple(marks))
    different = wanted.difference(found)
    if different == "base_merged":
        trained_with, has = (
            "nothing" if side.base_merged is None else repr(side.base_merged.get("adapter"))
            for side in (wanted, found)
        )
        raise AdapterError(
            f"{base.directory}: {has} is merged into it already, the adapter was trained on a base "
            f"with {trained_with} merged into it. Name that base with --base."
        )
    if different is not None:
        raise adapter.config_error(
            f"{different} is {getattr(wanted, different)}, that of {base.directory} is "
            f"{getattr(found, different)}: the adapter was trained on another base, or on one "
            "that was quantized with other settings. Name the right one with --base."
        )


def _pair_layer(
    adapter: Adapter, base: QuantizedCheckpoint, name: str, layer: AdapterLayer, convention: str
) -> LayerMerge:
    spec = base.layers[name]
    if layer.out_features != spec.out_features:
        raise adapter.error(
            f"{name}: B has {layer.out_features} rows, the base's layer {spec.out_features} "
            "outputs. It was trained on another base."
        )
    if adapter.is_ours:
        if layer.columns != spec.num_groups:
            raise adapter.error(
                f"{name}: A has {layer.columns} columns, the base's layer {spec.num_groups} "
                "groups. It was trained on another base or group size."
            )
        same = Regrouping(spec.group_size)
        return LayerMerge(layer, spec, spec, same, spec.group_size, layer.scaling)
    stated = adapter.config.get("qalora_group_size") if adapter.config.get("use_qalora") else None
    pool_size = pool_size_of(name, layer.columns, spec, stated)
    regrouping = regroup(name, spec, base.g_idx(name), pool_size)
    merged_spec = replace(spec, group_size=regrouping.group_size)
    factor = layer.scaling * convention_factor(convention, pool_size, spec.in_features)
    return LayerMerge(layer, spec, merged_spec, regrouping, pool_size, factor)
