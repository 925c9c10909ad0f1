"""Whole tensors that an adapter brings: modules_to_save, new heads, resized embeddings.

They replace the base's, or come on top of them; config.json follows where they change its sizes,
its class, or what is tied.
"""

from typing import Any

import torch

from ..architecture.model import Architecture, read_architecture
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.layout import TensorPlan
from ..errors import AdapterError
from .adapter import PREFIX, Adapter
from .pairing import trained_architecture


def plan_saved(
    adapter: Adapter, base: QuantizedCheckpoint, tensors: TensorPlan, config: dict[str, Any]
) -> dict[str, str]:
    """Put the adapter's whole tensors into the plan of a merge, in the adapter's dtype.

    Args:
        adapter: its `saved` takes over the base's names, and loses what only repeats the base.
        base: the base.
        tensors: of the result; changed.
        config: config.json of the result; changed.

    Returns:
        Tensors of the result that the base holds under another name only, since it ties them,
        {name: the base's name}.

    Raises:
        AdapterError: a tensor is missing, belongs to nothing, or does not fit the base.
    """
    if not adapter.saved and not adapter.config.get("modules_to_save"):
        return {}
    architecture = trained_architecture(adapter, base)
    if architecture is not None and not adapter.renamed:
        adapter.rename(architecture.stored)
    _check_not_quantized(adapter, base)
    copies = {}
    if architecture is None:
        _check_without_class(adapter, base, config)
    else:
        _check_keys(adapter, base, set(architecture.shapes), architecture.embeddings)
        _drop_repeated(adapter, base)
        architecture = _fit_config(adapter, base, architecture, config)
        copies = _untie(adapter, base, architecture, config)
    for name, original in copies.items():
        tensors[name] = tensors[original]
    for name, key in adapter.saved.items():
        tensors[name] = (adapter.infos[key].dtype, adapter.infos[key].shape)
    return copies


def _check_not_quantized(adapter: Adapter, base: QuantizedCheckpoint) -> None:
    for name, key in adapter.saved.items():
        if name.rpartition(".")[0] in base.layers:
            raise AdapterError(
                f"{adapter.weights}: {key}: modules_to_save names a layer that the base holds as "
                "integers; a checkpoint cannot hold its 16-bit copy. Adapt it instead, or keep it "
                "out of the quantization (modules_to_not_convert)."
            )


def _check_keys(
    adapter: Adapter, base: QuantizedCheckpoint, names: set[str], embeddings: set[str]
) -> None:
    """Every saved tensor has a reason to be there, and none of `names` that should be is missing.

    Embeddings are there without being asked for where PEFT finds that they were resized.
    """
    for name, key in adapter.saved.items():
        if not adapter.asks_to_save(name) and name not in embeddings:
            raise AdapterError(
                f"{adapter.weights}: extra key {key}: neither a matrix of the adapter nor named "
                "in modules_to_save, and not an embedding."
            )
    lost = [name for name in sorted(names - adapter.saved.keys()) if adapter.asks_to_save(name)]
    lost = [name for name in lost if name.rpartition(".")[0] not in base.layers]
    if lost:
        raise AdapterError(
            f"{adapter.weights}: missing key {PREFIX}{adapter.trained_tensor(lost[0])}, which "
            "modules_to_save selects. The file is incomplete: save the adapter again."
        )


def _check_without_class(
    adapter: Adapter, base: QuantizedCheckpoint, config: dict[str, Any]
) -> None:
    """The same, and shapes, where transformers does not know the model's class."""
    _check_keys(adapter, base, set(base.dense_names), set())
    vocabulary = config.get("text_config", config).get("vocab_size")
    for name, key in adapter.saved.items():
        shape = adapter.infos[key].shape
        if name in base.reader and base.reader.info(name).shape != shape:
            raise _wrong_shape(adapter, key, base.reader.info(name).shape)
        if shape[:1] == (vocabulary,) and config.get("tie_word_embeddings", True):
            raise AdapterError(
                f"{adapter.weights}: {key}: transformers has no class {config.get('architectures')}"
                " to tell whether this embedding is tied. Where it is not, write "
                f"tie_word_embeddings: false into the config.json of {base.directory}."
            )


def _wrong_shape(adapter: Adapter, key: str, expected: tuple[int, ...]) -> AdapterError:
    return AdapterError(
        f"{adapter.weights}: {key}: shape {list(adapter.infos[key].shape)}, the base's has "
        f"{list(expected)}. It was trained on another base, or resized: resize the base before "
        "quantizing it."
    )


def _drop_repeated(adapter: Adapter, base: QuantizedCheckpoint) -> None:
    """Forget embeddings that PEFT has saved of itself though they are still the base's."""
    for name in [name for name in adapter.saved if not adapter.asks_to_save(name)]:
        if name in base.reader and _same(adapter.get(adapter.saved[name]), base.reader.get(name)):
            del adapter.saved[name]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes."""
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    return torch.equal(a, b)


def _fit_config(
    adapter: Adapter,
    base: QuantizedCheckpoint,
    architecture: Architecture,
    config: dict[str, Any],
) -> Architecture:
    """Write the class of a new head, number of labels and vocabulary size into config.json.

    Returns:
        The architecture that config.json then describes.
    """
    known = {*base.reader.tensors, *architecture.tied, *architecture.tied.values()}
    new_head = not known.issuperset(adapter.saved)
    if new_head:
        config["architectures"] = [architecture.class_name]
    labels = architecture.model.config.num_labels
    embeddings, shapes = architecture.embeddings, architecture.shapes
    resized = False
    for name, key in adapter.saved.items():
        found, wanted = shapes.get(name, ()), adapter.infos[key].shape
        if found == wanted or not found or not wanted:
            continue
        resized = True
        if name in embeddings:
            config.get("text_config", config)["vocab_size"] = wanted[0]
        elif found[0] == labels:
            _set_labels(config, wanted[0])
    if resized:
        changed = read_architecture(config, base.weight_names, architecture.class_name)
        assert changed is not None
        architecture = changed
    _check_shapes(adapter, base, architecture)
    if new_head and not architecture.is_converted:
        _check_complete(adapter, architecture)
    return architecture


def _set_labels(config: dict[str, Any], count: int) -> None:
    config.pop("num_labels", None)
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
    config["label2id"] = {label: int(i) for i, label in config["id2label"].items()}


def _check_shapes(adapter: Adapter, base: QuantizedCheckpoint, architecture: Architecture) -> None:
    """What is saved, and what stays of the base, has the shapes that config.json now asks for."""
    shapes = architecture.shapes
    for name, key in adapter.saved.items():
        if shapes.get(name, adapter.infos[key].shape) != adapter.infos[key].shape:
            raise _wrong_shape(adapter, key, shapes[name])
    for name in architecture.embeddings - adapter.saved.keys():
        if name in base.reader and base.reader.info(name).shape != shapes[name]:
            key = next(adapter.saved[n] for n in architecture.embeddings if n in adapter.saved)
            raise AdapterError(
                f"{adapter.weights}: {key}: shape {list(adapter.infos[key].shape)}, but the base's "
                f"{name} has {list(base.reader.info(name).shape)}. Save both embeddings with the "
                "adapter, or resize the vocabulary before quantizing."
            )


def _check_complete(adapter: Adapter, architecture: Architecture) -> None:
    """A new class must not have layers that stayed random: PEFT saves what it is told to."""
    known = {*architecture.stored.values(), *adapter.saved, *architecture.tied}
    lost = sorted(architecture.shapes.keys() - known)
    if lost:
        raise AdapterError(
            f"{adapter.weights}: {architecture.class_name} has {lost[0]}, which is neither in the "
            "base nor in the adapter: it was random while the adapter was trained, and is lost. "
            f"Train with its module ({lost[0].rpartition('.')[0]}) in modules_to_save."
        )


def _untie(
    adapter: Adapter,
    base: QuantizedCheckpoint,
    architecture: Architecture,
    config: dict[str, Any],
) -> dict[str, str]:
    """PEFT trains copies: tied tensors that are no longer equal get a place each.

    Returns:
        As `plan_saved`.
    """
    groups: dict[str, list[str]] = {}
    for copy, name in architecture.tied.items():
        groups.setdefault(name, [name]).append(copy)
    held = {key: next((n for n in names if n in base.reader), key) for key, names in groups.items()}
    apart, repeated = None, []
    for key, names in groups.items():
        brought = [name for name in names if name in adapter.saved]
        if not brought:
            continue
        if _is_outgrown(held[key], adapter, base, architecture):
            adapter.saved[held[key]] = adapter.saved[brought[0]]
        values = (
            adapter.get(adapter.saved[n]) if n in adapter.saved else base.reader.get(held[key])
            for n in names
        )
        first = next(values)
        if not all(_same(first, value) for value in values):
            apart = brought[0]
        else:
            repeated += [name for name in names if name != held[key]]
    if apart is None:  # still one tensor each
        for name in repeated:
            adapter.saved.pop(name, None)
        return {}
    config["tie_word_embeddings"] = False
    if "tie_word_embeddings" in config.get("text_config", {}):
        config["text_config"]["tie_word_embeddings"] = False
    changed = read_architecture(config, base.weight_names, architecture.class_name)
    # encoder-decoder models scale their output by whether it is tied
    if changed is None or changed.tied or changed.model.config.is_encoder_decoder:
        raise AdapterError(
            f"{adapter.weights}: {adapter.saved[apart]}: the base ties this tensor to another, the "
            f"adapter holds a trained copy, and {architecture.class_name} cannot be loaded untied. "
            "Train without it in modules_to_save."
        )
    return {
        name: held[key]
        for key, names in groups.items()
        for name in names
        if name not in base.reader and name not in adapter.saved
    }


def _is_outgrown(
    name: str, adapter: Adapter, base: QuantizedCheckpoint, architecture: Architecture
) -> bool:
    """Whether PEFT has saved a resized tensor under the name of its tied copy only."""
    if name in adapter.saved or name not in base.reader:
        return False
    return base.reader.info(name).shape != architecture.shapes[name]
