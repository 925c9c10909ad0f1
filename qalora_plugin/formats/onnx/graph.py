"""A graph of onnxruntime-genai's builder whose products become `MatMulNBits` nodes."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..export import Progress
from . import FORMAT, MODEL_FILE

DATA_FILE = "model.onnx.data"
DOMAIN = "com.microsoft"
_ALIGNMENT = 64
_PRODUCT = re.compile(r"^/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul$")


class Term(NamedTuple):
    """One `MatMulNBits` node: its attributes, and its constant inputs by name, in order."""

    attributes: dict[str, int]
    constants: dict[str, torch.Tensor]


class Graph:
    """The graph that the builder wrote, and the products in it that layers are put in place of.

    Attributes:
        layers: the layers that have a product.
        dense: those whose product also computes a layer that is not wanted, and which that is.
    """

    def __init__(self, directory: Path, wanted: set[str]) -> None:
        """Read the graph without its data.

        Args:
            directory: where the builder wrote it.
            wanted: layers to replace.
        """
        self._directory = directory
        self._model = FORMAT.library("onnx").load(
            str(directory / MODEL_FILE), load_external_data=False
        )
        self._replaced: dict[str, list[str]] = {}  # initializer -> layers
        self.dense: dict[str, str] = {}
        for node in self._model.graph.node:
            names = layers_of(node.name) if node.op_type == "MatMul" else []
            others = [name for name in names if name not in wanted]
            if names and not others:
                self._replaced[node.input[1]] = names
            elif others:  # a fused product with one dense part stays dense as a whole
                self.dense |= {name: others[0] for name in names if name in wanted}
        self.layers = {name for names in self._replaced.values() for name in names}

    def write(
        self, out: Path, terms_of: Callable[[str], list[Term]], progress: Progress | None
    ) -> None:
        """Write graph and data, one layer in memory at a time.

        Args:
            out: the directory.
            terms_of: makes the nodes whose sum computes a layer.
            progress: called with (constants of the builder's graph done, all of them).
        """
        graph = self._model.graph
        initializers, nodes = list(graph.initializer), list(graph.node)
        del graph.initializer[:]
        del graph.node[:]
        terms: dict[str, list[dict[str, int]]] = {}  # layer -> attributes of its nodes
        with (self._directory / DATA_FILE).open("rb") as old, (out / DATA_FILE).open("wb") as new:
            for done, initializer in enumerate(initializers, start=1):
                names = self._replaced.get(initializer.name)
                if names is None:
                    graph.initializer.append(_copy(initializer, old, new))
                for name in names or ():
                    found = terms_of(name)
                    terms[name] = [term.attributes for term in found]
                    for i, term in enumerate(found):
                        graph.initializer.extend(_constants(f"{name}.{i}", term.constants, new))
                if progress is not None:
                    progress(done, len(initializers))
        for node in nodes:
            names = self._replaced.get(node.input[1]) if node.op_type == "MatMul" else None
            graph.node.extend([node] if names is None else _products(node, names, terms))
        (out / MODEL_FILE).write_bytes(self._model.SerializeToString())


def layers_of(node_name: str) -> list[str]:
    """Return the layers whose outputs, side by side, a product of the builder's graph computes."""
    match = _PRODUCT.match(node_name)
    if match is None:
        return ["lm_head"] if node_name == "/lm_head/MatMul" else []
    index, part, name = match.groups()
    names = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    module = f"model.layers.{index}.{'self_attn' if part == 'attn' else part}"
    return [f"{module}.{layer}" for layer in names.get(name, [name])]


def _products(
    node: Any, names: list[str], attributes: dict[str, list[dict[str, int]]]
) -> Iterator[Any]:
    """Make the nodes in place of one product: terms summed, layers side by side."""
    from onnx import helper

    parts = []
    for name in names:
        outputs = []
        for i, values in enumerate(attributes[name]):
            term = f"/{name}/MatMulNBits_{i}"
            outputs.append(f"{term}/output")
            constants = [f"{name}.{i}.{part}" for part in ("qweight", "scales", "zeros")]
            inputs = [node.input[0], *constants]
            yield helper.make_node(
                "MatMulNBits", inputs, outputs[-1:], term, domain=DOMAIN, **values
            )
        if len(outputs) > 1:
            total = f"/{name}/Sum/output"
            yield helper.make_node("Sum", outputs, [total], f"/{name}/Sum")
            outputs = [total]
        parts += outputs
    # also of one part: it gives the output its name
    yield helper.make_node("Concat", parts, node.output, f"{node.name}/Concat", axis=-1)


def _copy(initializer: Any, old: BinaryIO, new: BinaryIO) -> Any:
    """Return a constant with its numbers moved from the old file to the new one."""
    result = copy.deepcopy(initializer)
    if not initializer.external_data:
        return result
    place = {entry.key: entry.value for entry in initializer.external_data}
    old.seek(int(place["offset"]))
    return _store(result, old.read(int(place["length"])), new)


def _constants(name: str, tensors: dict[str, torch.Tensor], new: BinaryIO) -> Iterator[Any]:
    """Make constants of tensors, named `name`.part, their numbers in the new file."""
    proto = FORMAT.library("onnx").TensorProto
    types = {torch.uint8: proto.UINT8, torch.float32: proto.FLOAT}
    for part, tensor in tensors.items():
        constant = proto(name=f"{name}.{part}", data_type=types[tensor.dtype], dims=tensor.shape)
        yield _store(constant, tensor.contiguous().numpy().tobytes(), new)


def _store(constant: Any, numbers: bytes, new: BinaryIO) -> Any:
    """Append a constant's numbers to the file beside the graph, and say in it where they are."""
    new.write(bytes(-new.tell() % _ALIGNMENT))
    del constant.external_data[:]
    place = {"location": DATA_FILE, "offset": new.tell(), "length": len(numbers)}
    for key, value in place.items():
        constant.external_data.add(key=key, value=str(value))
    constant.data_location = FORMAT.library("onnx").TensorProto.EXTERNAL
    new.write(numbers)
    return constant
