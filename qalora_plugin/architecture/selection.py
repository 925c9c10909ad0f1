"""Choose the linear layers of a model to quantize: one rule for every way of quantizing."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qalora_kernels.stored import is_excluded, matches

from ..errors import ConfigError
from .blocks import find_towers
from .experts import Experts, is_fused

# parents whose forward computes with the `weight` of these layers instead of calling them, by
# class name; what is missing here is refused by `AbsentWeight` when it happens
_READ_BY_PARENT = {
    "MambaMixer": ("dt_proj", "x_proj", "out_proj"),
    "RwkvSelfAttention": ("output",),
    "RwkvFeedForward": ("value",),
}
_USUAL_ENTRY = "lm_head"  # in every list that was ever copied; headless models have none


def linears_in_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the `nn.Linear` layers inside a model's repeated blocks (`nn.ModuleList`s), by name.

    Embeddings, heads, poolers and projections outside the blocks are not among them, nor are
    output embeddings, subclasses of `nn.Linear`, whose forward may do something else, and what
    stands beside a mixture's experts: routers, and the gates of shared experts.
    """
    modules = dict(model.named_modules())
    routed = {
        name.rpartition(".")[0]
        for name, module in modules.items()
        if isinstance(module, Experts) or is_fused(module)
    }
    blocks = tuple(f"{name}." for name, m in modules.items() if isinstance(m, nn.ModuleList))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: module
        for name, module in modules.items()
        if type(module) is nn.Linear
        and module is not head
        and name.startswith(blocks)
        and name.rpartition(".")[0] not in routed
    }


def refuse_read_weights(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers to quantize that the model does not call.

    Raises:
        ConfigError: the model computes with the `weight` of one of them itself.
    """
    found: dict[str, str] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        if leaf in _READ_BY_PARENT.get(type(model.get_submodule(parent)).__name__, ()):
            found.setdefault(f"{parent.rpartition('.')[2]}.{leaf}", name)
    if found:
        first = next(iter(found.values()))
        raise ConfigError(
            f"{type(model).__name__} computes with the numbers of {first}.weight itself instead "
            "of calling the layer, so this layer cannot be quantized. Quantize the 16-bit model "
            f"with {sorted(found)} in modules_to_not_convert."
        )


def _refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers to quantize whose weight is another's too, as in Zamba's repeated blocks."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    others = {**{original: copy for copy, original in tied.items()}, **tied}
    for name in names:
        other = others.get(f"{name}.weight")
        if other is not None:
            raise ConfigError(
                f"{type(model).__name__}: {name}.weight and {other} are one tensor, which "
                "quantized layers cannot share. Quantize it with "
                f"{name.rpartition('.')[2]!r}, or what it lies in, in modules_to_not_convert."
            )


def check_overrides(overrides: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a `dynamic` that no layer to quantize matches, or that would mean another one on disk.

    The last entry that matches a layer counts, and config.json has its keys sorted.

    Raises:
        ConfigError: a key matches none of the names, or the order of two that match one counts and
            is not that of the alphabet.
    """
    names = list(names)
    for name in names:
        found = [entry for entry in overrides if matches(name, entry)]
        if found and overrides[found[-1]] != overrides[max(found)]:
            raise ConfigError(
                f"dynamic: {found[-1]!r} is to count for {name}, but config.json has its keys "
                f"sorted, so {max(found)!r}, which matches it too, would count when it is read. "
                f"Write '*{max(found)}' instead, which is sorted before all names."
            )
    for entry in overrides:
        if not any(matches(name, entry) for name in names):
            raise ConfigError(
                f"dynamic: {entry!r} matches none of the layers to quantize, which are called "
                f"like {names[0]}. Correct or remove it."
            )


def check_group_sizes(sizes: Iterable[int], linears: Iterable[nn.Linear]) -> None:
    """Refuse a group size that cuts none of the layers to quantize.

    Raises:
        ConfigError: one of the sizes is larger than every layer's inputs.
    """
    widest = max(linear.in_features for linear in linears)
    for size in sizes:
        if size > widest:
            raise ConfigError(
                f"group_size {size} is larger than the inputs of every layer to quantize (at most "
                f"{widest}): give a smaller one, or -1 for one group per output"
            )


def linears_in_towers(model: nn.Module, asked: Iterable[str] = ()) -> set[str]:
    """Return the names of the `linears_in_blocks` that stay dense because they see no text.

    These are the ones in the vision and audio towers of a model that reads text.

    Args:
        model: the model.
        asked: keys of `dynamic`; a tower that one of them names is quantized like the rest.
    """
    asked = list(asked)
    left = [t for t in find_towers(model) if not any(matches(t, entry) for entry in asked)]
    inside = tuple(f"{tower}." for tower in left)
    return {name for name in linears_in_blocks(model) if name.startswith(inside)}


def experts_alone(model: nn.Module, names: Iterable[str]) -> str | None:
    """Say why stock transformers would load random experts from a checkpoint of these layers.

    It overlooks tensors of single experts where its own files hold them fused. The guard of any
    other quantized layer makes it stop.

    Args:
        model: with its `Experts` in place.
        names: the layers that are quantized, or to be.

    Returns:
        Two sentences without the last full stop; None where another layer is quantized.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    silent = tuple(f"{name}." for name, module in found.items() if not module.is_guarded)
    if not silent or not all(name.startswith(silent) for name in names):
        return None
    return (
        f"{type(model).__name__}: experts alone cannot be quantized: its files hold them fused, "
        "and transformers without this package would load random ones unsaid. Quantize other "
        "layers, such as the attention, too"
    )


def linears_to_quantize(
    model: nn.Module,
    excluded: Iterable[str] | None = None,
    stored: Iterable[str] = (),
    asked: Iterable[str] = (),
) -> dict[str, nn.Linear]:
    """Return `linears_in_blocks`, less `linears_in_towers` and what `modules_to_not_convert` lists.

    Args:
        model: the model.
        excluded: entries of `modules_to_not_convert`.
        stored: names of tensors in the model's files, which `modules_to_not_convert` may use too.
        asked: keys of `dynamic`, see `linears_in_towers`.

    Raises:
        ConfigError: nothing is left, an entry of `modules_to_not_convert` matches nothing, or a
            layer cannot be quantized in this architecture.
    """
    excluded = list(excluded or ())
    linears = linears_in_blocks(model)
    known = {name for name, _ in model.named_modules()} | {n for n, _ in model.named_parameters()}
    known |= {part for name in stored for part in (name, name.removesuffix(".weight"))}
    known.discard("")  # the model itself
    for entry in excluded:
        if entry != _USUAL_ENTRY and not any(matches(name, entry) for name in known):
            raise ConfigError(
                f"modules_to_not_convert: {entry!r} matches no module of {type(model).__name__}, "
                f"whose layers are called like {next(iter(linears), 'none')}. Correct or remove it."
            )
    towers = linears_in_towers(model, asked)
    chosen = {
        name: module
        for name, module in linears.items()
        if name not in towers and not is_excluded(name, excluded)
    }
    if chosen:
        refuse_read_weights(model, chosen)
        _refuse_shared(model, chosen)
        problem = experts_alone(model, chosen)
        if problem is not None:
            raise ConfigError(f"{problem}.")
        return chosen
    name = type(model).__name__
    if linears:
        raise ConfigError(
            f"{name}: modules_to_not_convert {excluded} excludes all {len(linears)} linear layers "
            "of its blocks. Shorten the list."
        )
    conv = sum(isinstance(module, Conv1D) for module in model.modules())
    found = f"{conv} transformers Conv1D layers (as in GPT-2)" if conv else "none"
    raise ConfigError(
        f"{name}: no layer to quantize: expected torch.nn.Linear layers inside nn.ModuleList "
        f"blocks, found {found}. This architecture is not supported."
    )
