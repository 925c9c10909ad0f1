"""Whole tensors that an adapter brings: modules_to_save, new heads, resized embeddings.

They replace the base's, or come on top of them; config.json follows where they change its sizes,
its class, or what is tied.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..architecture.model import Architecture, read_architecture
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..errors import AdapterError
from .adapter import PREFIX, Adapter
from .names import TrainedModel

Saved = dict[str, str]  # keys in the adapter by the base's names of tensors


@dataclass(frozen=True)
class DenseTensors:
    """The sources of a merge's tensors that no quantized layer packs.

    Args:
        from_base: the base's name by name in the result: its own, or for a tensor that the base
            ties and the result does not, that of the one that it was tied to.
        from_adapter: the adapter's key by name in the result.
        config: config.json of the result, the quantization_config still the base's.
    """

    from_base: dict[str, str]
    from_adapter: dict[str, str]
    config: dict[str, Any]


def plan_dense(adapter: Adapter, base: QuantizedCheckpoint, trained: TrainedModel) -> DenseTensors:
    """Decide where every dense tensor of the result comes from; nothing is changed or written.

    Raises:
        AdapterError: a tensor is missing, belongs to nothing, or does not fit the base.
    """
    saved = {trained.in_base(name): key for name, key in adapter.saved.items()}
    dense = DenseTensors({}, saved, base.reader.config)
    if saved or adapter.config.get("modules_to_save"):
        _check_keys(adapter, base, trained, saved)
        if trained.architecture is None:
            _check_without_class(adapter, base, saved)
        else:
            new = {  # PEFT saves embeddings unasked, also where they are still the base's
                name: key
                for name, key in saved.items()
                if adapter.asks_to_save(trained.in_model(name))
                or name not in base.reader
                or not _same(adapter.get(key), base.reader.get(name))
            }
            dense = _place(adapter, base, trained.architecture, new)
    kept = {name: name for name in base.dense_names if name not in dense.from_adapter}
    return replace(dense, from_base=kept | dense.from_base)


def _check_keys(
    adapter: Adapter, base: QuantizedCheckpoint, trained: TrainedModel, saved: Saved
) -> None:
    """Check that every saved tensor has a reason to be there, and that none is missing.

    Embeddings are there without being asked for where PEFT finds that they were resized.
    """
    names, embeddings = set(base.dense_names), set[str]()
    if trained.architecture is not None:
        names, embeddings = set(trained.architecture.shapes), trained.architecture.embeddings
    for name, key in saved.items():
        if name.rpartition(".")[0] in base.layers:
            raise adapter.error(
                f"{key}: modules_to_save names a layer that the base holds as integers; a "
                "checkpoint cannot hold its 16-bit copy. Adapt it instead, or keep it out of the "
                "quantization (modules_to_not_convert)."
            )
        info = adapter.reader.info(key)
        if name in base.reader and base.reader.info(name).is_float != info.is_float:
            raise adapter.error(
                f"{key}: expected {base.reader.info(name).dtype_name}, as in the base, or another "
                f"width of it, found {info.dtype_name}. The file is damaged: save it again."
            )
        if name not in embeddings and not adapter.asks_to_save(trained.in_model(name)):
            raise adapter.error(
                f"extra key {key}: neither a matrix of the adapter nor named in modules_to_save, "
                "and not an embedding."
            )
    for name in sorted(names - saved.keys()):
        key = trained.in_model(name)
        if adapter.asks_to_save(key) and name.rpartition(".")[0] not in base.layers:
            raise adapter.error(
                f"missing key {PREFIX}{key}, which modules_to_save selects. The file is "
                "incomplete: save the adapter again."
            )


def _check_without_class(adapter: Adapter, base: QuantizedCheckpoint, saved: Saved) -> None:
    """Check shapes and ties where transformers does not know the model's class."""
    config = base.reader.config
    vocabulary = config.get("text_config", config).get("vocab_size")
    for name, key in saved.items():
        shape = adapter.reader.info(key).shape
        if name in base.reader and base.reader.info(name).shape != shape:
            raise _wrong_shape(adapter, key, base.reader.info(name).shape)
        if shape[:1] == (vocabulary,) and config.get("tie_word_embeddings", True):
            raise adapter.error(
                f"{key}: transformers has no class {config.get('architectures')} to tell whether "
                "this embedding is tied. Where it is not, write tie_word_embeddings: false into "
                f"the config.json of {base.directory}."
            )


def _wrong_shape(adapter: Adapter, key: str, expected: tuple[int, ...]) -> AdapterError:
    return adapter.error(
        f"{key}: shape {list(adapter.reader.info(key).shape)}, the base's has {list(expected)}. "
        "It was trained on another base, or resized: save both embeddings with the adapter, or "
        "resize the base before quantizing it."
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors hold the same numbers, whatever their dtypes."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return torch.equal(a, b)


def _place(
    adapter: Adapter, base: QuantizedCheckpoint, architecture: Architecture, saved: Saved
) -> DenseTensors:
    """Give each saved tensor its place, those that are no longer tied one each; fit config.json."""
    ties = _ties(base, architecture)
    placed, apart = _separate(adapter, base, ties, saved)
    config, copies = _fit_config(adapter, base, architecture, saved), dict[str, str]()
    if apart is not None:
        config = _untied(config)
        for held, names in ties.items():
            free = [name for name in names if name not in base.reader and name not in placed]
            copies |= dict.fromkeys(free, held)
    final: Architecture | None = architecture
    if config != base.reader.config:
        final = read_architecture(config, base.weight_names, architecture.class_name)
    assert final is not None  # of the same class
    _check_shapes(adapter, base, final, saved)
    known = {*base.reader.tensors, *architecture.tied, *architecture.tied.values()}
    if not known.issuperset(saved):  # a new head
        config = {**config, "architectures": [final.class_name]}
        _check_complete(adapter, final, {*saved, *placed, *copies})
    # encoder-decoder models scale their output by whether it is tied
    if apart is not None and (final.tied or final.model.config.is_encoder_decoder):
        raise adapter.error(
            f"{apart}: the base ties this tensor to another, the adapter holds a trained copy, "
            f"and {final.class_name} cannot be loaded untied. Train without it in modules_to_save."
        )
    return DenseTensors(copies, placed, config)


def _ties(base: QuantizedCheckpoint, architecture: Architecture) -> dict[str, list[str]]:
    """Return all names of each tensor that has several, by the one that the base's files hold."""
    groups: dict[str, list[str]] = {}
    for copy, name in architecture.tied.items():
        groups.setdefault(name, [name]).append(copy)
    return {
        next((n for n in group if n in base.reader), group[0]): group for group in groups.values()
    }


def _separate(
    adapter: Adapter, base: QuantizedCheckpoint, ties: dict[str, list[str]], saved: Saved
) -> tuple[Saved, str | None]:
    """Find tied tensors that are no longer equal: PEFT trains a copy under each name.

    Returns:
        The keys by the names to write them under, and that of the first unequal copy, or None.
    """
    placed, apart = dict(saved), None
    for held, names in ties.items():
        key = next((saved[name] for name in names if name in saved), None)
        if key is None:
            continue
        if held in base.reader and base.reader.info(held).shape != adapter.reader.info(key).shape:
            placed.setdefault(held, key)  # resized, and saved under the name of a copy only
        values = (
            adapter.get(placed[name]) if name in placed else base.reader.get(held) for name in names
        )
        first = next(values)
        if not all(_same(first, value) for value in values):
            apart = apart or key
    if apart is None:  # one tensor each, under the names that the base's files hold
        repeated = {name for held, names in ties.items() for name in names if name != held}
        repeated -= base.reader.tensors.keys()
        placed = {name: key for name, key in placed.items() if name not in repeated}
    return placed, apart


def _fit_config(
    adapter: Adapter, base: QuantizedCheckpoint, architecture: Architecture, saved: Saved
) -> dict[str, Any]:
    """Return config.json with the vocabulary size and number of labels of the saved tensors."""
    config, shapes, embeddings = base.reader.config, architecture.shapes, architecture.embeddings
    for name, key in saved.items():
        found, wanted = shapes.get(name, ()), adapter.reader.info(key).shape
        if found == wanted or not found or not wanted:
            continue
        if name in embeddings:
            size = {"vocab_size": wanted[0]}
            text = config.get("text_config")
            config = config | (size if text is None else {"text_config": text | size})
        elif found[0] == architecture.model.config.num_labels:
            labels = {str(i): f"LABEL_{i}" for i in range(wanted[0])}
            ids = {label: int(i) for i, label in labels.items()}
            config = config | {"id2label": labels, "label2id": ids}
            config.pop("num_labels", None)
    return config


def _untied(config: dict[str, Any]) -> dict[str, Any]:
    untied, text = {"tie_word_embeddings": False}, config.get("text_config", {})
    nested = {"text_config": text | untied} if "tie_word_embeddings" in text else {}
    return config | untied | nested


def _check_shapes(
    adapter: Adapter, base: QuantizedCheckpoint, architecture: Architecture, saved: Saved
) -> None:
    """Check that what is saved, and what stays of the base, is as config.json now says."""
    shapes = architecture.shapes
    for name, key in saved.items():
        if shapes.get(name, adapter.reader.info(key).shape) != adapter.reader.info(key).shape:
            raise _wrong_shape(adapter, key, shapes[name])
    resized = [saved[name] for name in sorted(architecture.embeddings) if name in saved]
    for name in sorted(architecture.embeddings - saved.keys()) if resized else ():
        if name in base.reader and base.reader.info(name).shape != shapes[name]:
            raise _wrong_shape(adapter, resized[0], base.reader.info(name).shape)


def _check_complete(adapter: Adapter, architecture: Architecture, merged: set[str]) -> None:
    """Check that a new class has no layers that stayed random: PEFT saves what it is told to."""
    known = {*architecture.stored.values(), *architecture.tied, *merged}
    lost = sorted(architecture.shapes.keys() - known)
    if lost and not architecture.is_converted:
        raise adapter.error(
            f"{architecture.class_name} has {lost[0]}, which is neither in the base nor in the "
            "adapter: it was random while the adapter was trained, and is lost. Train with its "
            f"module ({lost[0].rpartition('.')[0]}) in modules_to_save."
        )
