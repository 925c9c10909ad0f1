"""Read the weights of an ONNX graph's quantized products back with ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ..weights import ExportedWeights
from . import FORMAT, MODEL_FILE
from .graph import DOMAIN, layers_of


class Weights(ExportedWeights):
    """Weights by products of the identity with a layer's nodes; constants of dense ones."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._onnx = FORMAT.library("onnx")
        graph = self._onnx.load(str(exported / MODEL_FILE), load_external_data=False).graph
        self._constants = {constant.name: constant for constant in graph.initializer}
        self._nodes: dict[str, list[Any]] = {}
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                layer = node.name.rpartition("/")[0].removeprefix("/")
                self._nodes.setdefault(layer, []).append(node)
        self._dense = {
            layer: (node.input[1], layers_of(node.name))
            for node in graph.node
            if node.op_type == "MatMul"
            for layer in layers_of(node.name)
        }

    def get(self, name: str) -> torch.Tensor | None:
        """Return W of a layer that is quantized in the source, None of every other tensor."""
        layer = name.removesuffix(".weight")
        if layer not in self.source.layers:
            return None
        if terms := self._nodes.get(layer):
            return torch.stack([self._product(node) for node in terms]).sum(0)
        return self._columns(layer) if layer in self._dense else None

    def _columns(self, layer: str) -> torch.Tensor:
        """Return W [N, K] of a layer that stayed dense, of the constant of its product."""
        constant, names = self._dense[layer]
        whole = self._onnx.numpy_helper.to_array(self._constants[constant], str(self.exported))
        start = sum(self._outputs(name) for name in names[: names.index(layer)])
        return torch.from_numpy(whole[:, start : start + self._outputs(layer)].copy()).t()

    def _outputs(self, name: str) -> int:
        spec = self.source.layers.get(name)
        return (
            spec.out_features if spec else int(self.source.reader.info(f"{name}.weight").shape[0])
        )

    def _product(self, node: Any) -> torch.Tensor:
        """Run one node alone: W [N, K] of its term."""
        from onnx.external_data_helper import load_external_data_for_tensor

        helper, types = self._onnx.helper, self._onnx.TensorProto
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        values = [self._constants[name] for name in node.input[1:]]
        for value in values:
            if value.data_location == types.EXTERNAL:
                load_external_data_for_tensor(value, str(self.exported))
        x, y = (
            helper.make_tensor_value_info(name, types.FLOAT, [None, sizes[size]])
            for name, size in ((node.input[0], "K"), (node.output[0], "N"))
        )
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(
            helper.make_graph([node], "layer", [x], [y], values),
            opset_imports=opsets,
            ir_version=10,
        )
        session = FORMAT.library("onnxruntime").InferenceSession(model.SerializeToString())
        for value in values:
            value.ClearField("raw_data")  # one layer in memory at a time
            value.data_location = types.EXTERNAL
        (product,) = session.run(None, {node.input[0]: np.eye(sizes["K"], dtype=np.float32)})
        return torch.from_numpy(product).t()
