"""Read exported weights back with the library of the runtime they are for, for `verify_export`.

Each function opens an export and returns what gives one tensor of the source's name: a layer's W
[N, K] dequantized by that library, or another tensor as it is stored. A layer that the export
computes together with others gives None.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..files.reader import CheckpointReader
from ..formats.gguf.metadata import Metadata
from ..formats.gguf.write import tensor_names
from ..formats.onnx.write import DOMAIN, MODEL_FILE
from ..formats.walk import dense, require

Weights = Callable[[str], torch.Tensor | None]


def torchao(exported: Path, source: QuantizedCheckpoint) -> Weights:
    """Weights by torchao's `dequantize`."""
    require("torchao", "torchao")
    from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

    reader = CheckpointReader(exported)

    def read(name: str) -> torch.Tensor:
        if name in reader:
            return reader.get(name)
        start = name.removesuffix(".weight") + "._weight_"
        parts = {key: reader.get(key) for key in reader.tensors if key.startswith(start)}
        metadata = {"tensor_names": json.dumps([name]), name: reader.metadata[name]}
        return unflatten_tensor_state_dict(parts, metadata)[0][name].dequantize()

    return read


def mlx(exported: Path, source: QuantizedCheckpoint) -> Weights:
    """Weights by `mlx.core.dequantize`."""
    mx = require("mlx.core", "mlx")
    reader = CheckpointReader(exported)
    files = {path: mx.load(str(path)) for path in reader.files}
    grids = reader.config["quantization"]

    def read(name: str) -> torch.Tensor:
        def get(key: str) -> Any:
            return files[reader.info(key).file][key]

        layer, value = name.removesuffix(".weight"), get(name)
        if f"{layer}.scales" in reader:
            grid = grids.get(layer) or grids
            value = mx.dequantize(
                value,
                get(f"{layer}.scales"),
                get(f"{layer}.biases"),
                group_size=grid["group_size"],
                bits=grid["bits"],
            )
        return torch.from_numpy(np.array(value.astype(mx.float32)))

    return read


def gguf(exported: Path, source: QuantizedCheckpoint) -> Weights:
    """Weights by gguf-py's `dequantize`, rows in Hugging Face's order."""
    package = require("gguf", "gguf")
    metadata = Metadata(source.directory)
    tensors = {tensor.name: tensor for tensor in package.GGUFReader(exported).tensors}
    names = tensor_names(source, metadata, package)

    def read(name: str) -> torch.Tensor | None:
        packed = name.removesuffix(".weight") + ".qweight"
        stored = tensors.get(names.get(name) or names.get(packed) or "")
        if stored is None:
            return None
        values = package.quants.dequantize(stored.data, stored.tensor_type)
        value = torch.from_numpy(np.array(values, dtype=np.float32))
        if metadata.architecture.norm_plus_one and name.endswith("norm.weight"):
            value -= 1
        rows = metadata.rows(name)(torch.arange(value.shape[0]))
        return torch.empty_like(value).index_copy_(0, rows, value)

    return read


def gguf_kinds(exported: Path, source: QuantizedCheckpoint) -> dict[str, str]:
    """GGUF's type of every matrix, such as "Q4_1", by the source's name of the weight.

    Tied output embeddings are there under the name of their own as well.
    """
    package = require("gguf", "gguf")
    types = {t.name: t.tensor_type.name for t in package.GGUFReader(exported).tensors}
    kinds = {}
    for tensor, name in tensor_names(source, Metadata(source.directory), package).items():
        if name in types and tensor.endswith(("weight", ".qweight")):
            layer = tensor.removesuffix(".qweight").removesuffix(".weight")
            kinds[f"{layer}.weight"] = types[name]
    if "output.weight" not in types:
        kinds["lm_head.weight"] = types["token_embd.weight"]
    return kinds


def onnx(exported: Path, source: QuantizedCheckpoint) -> Weights:
    """Weights by ONNX Runtime: products of the identity with the nodes of a layer."""
    package = require("onnx", "onnx")
    runtime = require("onnxruntime", "onnx")
    from onnx.external_data_helper import load_external_data_for_tensor

    graph = package.load(str(exported / MODEL_FILE), load_external_data=False).graph
    constants = {initializer.name: initializer for initializer in graph.initializer}
    nodes: dict[str, list[Any]] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            nodes.setdefault(node.name.rpartition("/")[0].removeprefix("/"), []).append(node)

    def run(node: Any) -> torch.Tensor:
        helper, types = package.helper, package.TensorProto
        sizes = {a.name: a.i for a in node.attribute}
        values = [constants[name] for name in node.input[1:]]
        for value in values:
            if value.data_location == types.EXTERNAL:
                load_external_data_for_tensor(value, str(exported))
        one = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info(node.input[0], types.FLOAT, [None, sizes["K"]])],
            [helper.make_tensor_value_info(node.output[0], types.FLOAT, [None, sizes["N"]])],
            values,
        )
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(one, opset_imports=opsets, ir_version=10)
        session = runtime.InferenceSession(model.SerializeToString())
        for value in values:
            value.ClearField("raw_data")  # one layer in memory at a time
            value.data_location = types.EXTERNAL
        (y,) = session.run(None, {node.input[0]: np.eye(sizes["K"], dtype=np.float32)})
        return torch.from_numpy(y).t()

    def read(name: str) -> torch.Tensor | None:
        terms = nodes.get(name.removesuffix(".weight"))
        return torch.stack([run(node) for node in terms]).sum(0) if terms else None

    return read


def gptq(exported: Path, source: QuantizedCheckpoint) -> Weights:
    """Weights by the GPTQ formula: the runtimes that own the format need other environments."""
    checkpoint = open_quantized(exported)

    def read(name: str) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if layer in checkpoint.layers:
            return dense(checkpoint.layer(layer), checkpoint.layers[layer])
        return checkpoint.reader.get(name)

    return read
