"""Experts as other runtimes store them: one tensor [E, ...] for a projection of all experts."""

from collections.abc import Mapping

from qalora_kernels import QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.layout import expert_place
from ..errors import CheckpointError

_ALL_OR_NONE = "Quantize all or none of a layer's experts."
# Mixtral's names of an expert's projections
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def projection(name: str) -> str:
    """Return "gate_proj", "up_proj" or "down_proj" for what a checkpoint calls it."""
    return _PROJECTIONS.get(name, name)


def expert_stacks(source: QuantizedCheckpoint) -> dict[str, list[str]]:
    """Return the quantized layers of experts that a runtime stores as one tensor, in order.

    Returns:
        {"model.layers.0.mlp.experts.up_proj": its layers, that of expert 0 first}; empty if the
        model is no mixture.

    Raises:
        CheckpointError: some of these experts, or of their projections, are not quantized, or on
            another grid.
    """
    stacks: dict[str, dict[int, str]] = {}
    for layer in source.layers:
        place = expert_place(layer)
        if place is not None:
            stack = stacks.setdefault(f"{place.experts}.{place.projection}", {})
            stack[place.number] = layer
    for name, layers in stacks.items():
        _check(source, name, layers)
    found: dict[str, set[str]] = {}
    for name in stacks:
        experts, _, own = name.rpartition(".")
        found.setdefault(experts, set()).add(projection(own))
    for experts, projections in found.items():
        if missing := sorted(set(_PROJECTIONS.values()) - projections):
            raise CheckpointError(
                f"{source.directory}: {experts}: {', '.join(missing)} of its experts is in 16 "
                f"bits, the rest is quantized. {_ALL_OR_NONE}"
            )
    return {name: [layers[i] for i in range(len(layers))] for name, layers in stacks.items()}


def _check(source: QuantizedCheckpoint, name: str, layers: Mapping[int, str]) -> None:
    config = source.reader.config
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    total = next((int(config[key]) for key in keys if config.get(key)), len(layers))
    if sorted(layers) != list(range(total)):
        raise CheckpointError(
            f"{source.directory}: {name}: {len(layers)} of {total} experts are quantized, and "
            f"this format holds all of them in one tensor. {_ALL_OR_NONE}"
        )
    grids: set[QuantSpec] = {source.layers[layer] for layer in layers.values()}
    if len(grids) > 1:
        found = sorted({(grid.bits, grid.group_size) for grid in grids})
        raise CheckpointError(
            f"{source.directory}: {name}: its experts differ in bits or group_size ({found}), and "
            "this format holds all of them in one tensor. Give them one grid."
        )
