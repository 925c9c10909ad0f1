"""Compare the names in a checkpoint with its model: every tensor needs a place, and the reverse.

transformers only warns of a layer that it has no place for, and fills a parameter that has no
tensor with random numbers.
"""

import re
from collections.abc import Collection, Iterable

from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..files.names import CONFIG_FILE
from .blocks import find_blocks
from .names import LayerNames
from .selection import experts_alone

# buffers that older releases of transformers wrote into every checkpoint
_ONCE_STORED = r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.masked_bias$"


def places_problem(
    model: PreTrainedModel,
    stored: Iterable[str],
    quantized: Collection[str] = (),
    architectures: Collection[str] | None = None,
) -> str | None:
    """Say why a checkpoint's tensors and a model's parameters do not belong to each other.

    A class that the checkpoint was saved from has to have all. Another one, such as a classifier
    on a causal LM, may lack the old head and add a new one, and encoders' files often hold heads
    for several tasks: then only what is in the blocks, and beside them, is compared.

    Args:
        model: without weights, and without quantized layers in place.
        stored: names of the checkpoint's tensors; a quantized layer's is that of its `weight`.
        quantized: names of the layers that are quantized.
        architectures: names of classes in config.json; None if it names none.

    Returns:
        Sentences that name a tensor, a parameter or the model, and say what to do, without the last
        full stop; None if all fits.
    """
    names, kind = LayerNames(model), type(model).__name__
    is_named = not architectures or kind in architectures
    found: set[str] = set()
    homeless: list[str] = []
    for name in stored:
        places = names.places(name)
        layer = name.removesuffix(".weight")
        if places.is_converted and layer in quantized:
            return (
                f"{layer} is a quantized layer of its own, but transformers fuses it with others "
                f"into {places.targets[0]} of {kind} (a mixture's experts, or fused projections), "
                "which no quantized layer can stand in for. Such a checkpoint cannot be loaded "
                "yet: use a model whose layers are not fused, or one that is not quantized"
            )
        found.update(target for target in places.targets if names.has(target))
        own_bias = name.removesuffix(".bias") in quantized  # an all-zero one is no loss
        if not own_bias and not any(map(names.has, places.targets)):
            homeless.append(names.unknown(name))
    all_have_places = is_named and model.can_generate()
    surplus = _not_ignored(homeless, model._keys_to_ignore_on_load_unexpected, _ONCE_STORED)
    surplus = [name for name in surplus if all_have_places or _is_in_blocks(model, name)]
    if surplus:
        return (
            f"{surplus[0]} ({len(surplus)} such) has no place in {kind}. {CONFIG_FILE} belongs to "
            "another model, or was changed: restore the original one"
        )
    needed = _needed(model, everything=is_named)
    lost = _not_ignored(
        _untied(model, needed - found, found), model._keys_to_ignore_on_load_missing
    )
    if lost:
        return (
            f"no tensor for {lost[0]} ({len(lost)} such) of {kind}, which would be random. The "
            f"checkpoint is incomplete, or {CONFIG_FILE} belongs to another model: copy both from "
            "one source"
        )
    return experts_alone(model, quantized) if quantized else None


def _block_lists(model: nn.Module) -> tuple[str, ...]:
    lists = (name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return tuple(f"{name}." for name in lists)


def _is_in_blocks(model: PreTrainedModel, name: str) -> bool:
    prefix = f"{model.base_model_prefix}."  # which a backbone's names lack
    return f"{prefix}{name.removeprefix(prefix)}".startswith(
        tuple(prefix + block.removeprefix(prefix) for block in _block_lists(model))
    )


def _needed(model: PreTrainedModel, everything: bool) -> set[str]:
    """Return the parameters and buffers that a checkpoint has to have."""
    state = model.state_dict().keys()
    if everything:
        return set(state)
    try:
        prefix = find_blocks(model)[0].rpartition(".")[0]
    except ConfigError:  # no blocks
        return set()
    inputs = model.get_input_embeddings()
    own = tuple(f"{name}." for name, module in model.named_modules() if module is inputs)
    beside = f"{prefix}." if prefix else ""
    inside = _block_lists(model)
    return {name for name in state if name.startswith((beside, *own, *inside))}


def _untied(model: PreTrainedModel, lost: set[str], found: set[str]) -> list[str]:
    """Return what is lost and not tied to anything that was found."""
    tied: dict[str, str] = model.all_tied_weights_keys
    known = {tied.get(name, name) for name in found}
    return sorted(name for name in lost if tied.get(name, name) not in known)


def _not_ignored(
    names: Iterable[str], patterns: Iterable[str] | None, more: Iterable[str] = ()
) -> list[str]:
    ignored = [re.compile(pattern) for pattern in (*(patterns or ()), *more)]
    return [name for name in names if not any(pattern.search(name) for pattern in ignored)]
