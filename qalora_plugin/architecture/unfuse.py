"""Give a model its experts as a checkpoint stores them: one linear layer a projection."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from transformers import PreTrainedModel

from ..files.safetensors import TensorInfo
from .experts import FUSED, ExpertNames, Experts, is_fused
from .names import LayerNames

_OWN = re.compile(rf"(.+)\.\d+\.({'|'.join(ExpertNames())})\.weight")


def unfuse_experts(
    model: PreTrainedModel,
    stored: Iterable[str],
    is_chosen: Callable[[str], bool] = lambda layer: True,
) -> None:
    """Give a model `Experts` for fused ones that a checkpoint stores one by one.

    Experts that transformers computes in a way of their own stay as they are.

    Args:
        model: without weights.
        stored: names of the checkpoint's tensors; a quantized layer's is that of its `weight`.
        is_chosen: whether a layer, by the checkpoint's name, is one to quantize, or quantized;
            where no expert has one, they stay fused.
    """
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    if not fused:
        return
    names = LayerNames(model)
    leaves: dict[str, dict[tuple[str, int], str]] = {}
    guarded: set[str] = set()
    is_any_chosen = False
    for name in stored:
        converted = names.fused_part(name)
        part = converted or _own_part(names.parameter(name))
        if converted is not None:
            guarded.add(converted[0].rpartition(".")[0])
        if part is not None:
            owner, _, parameter = part[0].rpartition(".")
            layer = name.removesuffix(".weight")
            leaves.setdefault(owner, {})[parameter, part[1]] = layer.rpartition(".")[2]
            is_any_chosen = is_any_chosen or is_chosen(layer)
    if not is_any_chosen:
        return
    up, down = FUSED
    for name, module in fused.items():
        found = leaves.get(name, {})
        if found.keys() == {(up, 0), (up, 1), (down, 0)}:
            leaf = ExpertNames(found[up, 0], found[up, 1], found[down, 0])
            experts = Experts(module, leaf)
            experts.is_guarded = name in guarded
            model.set_submodule(name, experts)


def _own_part(name: str) -> tuple[str, int] | None:
    """Return the part of a fused parameter that `split_experts` has named so; else None."""
    found = _OWN.fullmatch(name)
    if found is None:
        return None
    places = dict(zip(ExpertNames(), ((FUSED[0], 0), (FUSED[0], 1), (FUSED[1], 0)), strict=True))
    parameter, number = places[found[2]]
    return f"{found[1]}.{parameter}", number


def split_experts(
    model: PreTrainedModel,
    tensors: Mapping[str, TensorInfo],
    is_chosen: Callable[[str], bool] = lambda layer: True,
) -> dict[str, TensorInfo]:
    """Return a checkpoint's tensors with those of fused experts cut into one a projection.

    What is stored as transformers computes with it, such as GraniteMoE's, lies in the file expert
    by expert: every part is a range of its bytes.

    Args:
        model: without weights, its experts fused.
        tensors: of the checkpoint, by name.
        is_chosen: whether a layer is one to quantize; where no expert has one, none is cut.

    Returns:
        The same tensors where the experts are stored one by one.
    """
    fused = {name for name, module in model.named_modules() if is_fused(module)}
    names = LayerNames(model)
    found: dict[str, TensorInfo] = {}
    is_any_chosen = False
    for stored, info in tensors.items():
        target = names.parameter(stored)
        owner, _, parameter = target.rpartition(".")
        is_whole = owner in fused and parameter in FUSED and not names.places(stored).is_converted
        if is_whole and info.shape == tuple(model.get_parameter(target).shape):
            parts = ExpertNames()[:2] if parameter == FUSED[0] else ExpertNames()[2:]
            cut = {part.name: part for part in _cut(info, owner, parts)}
            is_any_chosen |= any(is_chosen(name.removesuffix(".weight")) for name in cut)
            found |= cut
        else:
            found[stored] = info
    return found if is_any_chosen else dict(tensors)


def _cut(info: TensorInfo, owner: str, parts: tuple[str, ...]) -> Iterator[TensorInfo]:
    """Yield one tensor for each expert and part of [E, parts * N, K]."""
    experts, rows, columns = info.shape
    count = experts * len(parts)
    nbytes, shape = info.nbytes // count, (rows // len(parts), columns)
    for index in range(count):
        name = f"{owner}.{index // len(parts)}.{parts[index % len(parts)]}.weight"
        start = info.start + index * nbytes
        yield replace(info, name=name, shape=shape, start=start, nbytes=nbytes)


def unfuse_all(model: PreTrainedModel) -> None:
    """Give a model `Experts` for fused ones that 16-bit checkpoints usually store one by one."""
    leaves = LayerNames(model).expert_projections()
    fused = [name for name, module in model.named_modules() if is_fused(module)]
    unfuse_experts(model, [f"{name}.0.{leaf}.weight" for name in fused for leaf in leaves])
