"""ONNX Runtime directories with a KV cache, for onnxruntime-genai.

onnxruntime-genai's own builder makes the graph from the model in fp32; then the product of every
quantized layer is replaced by `MatMulNBits` (onnxruntime, ContribOperators.md, com.microsoft):

    B            uint8 [N, blocks, block * bits / 8]   low bits first; 3 bits in 4, 8 as two times 4
    scales       fp32  [N * blocks]
    zero_points  fp32  [N * blocks]   2^(bits-1) - offsets / scales, real-valued

Weights of everything else stay fp32. The builder holds the model in fp32 while it runs.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qalora_kernels import PackedWeight, QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...checkpoint.layout import TensorPlan
from ...errors import CheckpointError
from ...files.atomic import AtomicDirectory
from ...files.safetensors import TensorInfo
from ..rope import with_legacy_rope
from ..walk import (
    ExportResult,
    Progress,
    codes,
    dense_config,
    obstacles,
    regroup,
    require,
    write_directory,
)

EXACTNESS = "Exact in fp32 (to its rounding, 1e-6 of a weight)."
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
DOMAIN = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)
_ALIGNMENT = 64
_COPY_BYTES = 16 << 20
_PRODUCT = re.compile(r"^/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMul$")


def block_size(spec: QuantSpec) -> int | None:
    """The largest block that the layer's groups can be cut into; the last one may be short."""
    if spec.num_groups == 1:
        return _BLOCKS[0] if spec.in_features >= _BLOCKS[0] else 16
    return next((size for size in _BLOCKS if spec.group_size % size == 0), None)


def obstacle(spec: QuantSpec, act_order: bool) -> str | None:
    """Why the layer cannot be held as integers, or None."""
    if act_order:
        return "its groups follow act-order (g_idx), MatMulNBits' blocks are neighbours"
    if block_size(spec) is None:
        return f"groups of {spec.group_size} cannot be cut into blocks of 16, 32, 64, 128 or 256"
    return None


Term = tuple[dict[str, int], dict[str, torch.Tensor]]
"""Attributes and constant inputs of one MatMulNBits node."""


def matmul_nbits(layer: PackedWeight, spec: QuantSpec) -> list[Term]:
    """The nodes whose sum computes a layer: one, or two for 8 bits.

    ONNX Runtime has real-valued zero-points up to 4 bits only, so 8 bits are two halves:
    W = 16 * scales * (high - zero) + scales * low.
    """
    values, scales = codes(layer, spec), layer.scales
    zeros = spec.mid - layer.offsets.double() / scales.double()
    if spec.bits < 8:
        return [_term(values, scales, zeros, spec)]
    high = _term(values >> 4, scales * 16, zeros / 16, spec)
    return [high, _term(values & 15, scales, torch.zeros_like(zeros), spec)]


def _term(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, spec: QuantSpec) -> Term:
    """The node of scales * (values - zeros); values [N, K], the others [G, N]."""
    block = block_size(spec)
    assert block is not None
    bits = 2 if spec.bits == 2 else 4
    n, blocks = spec.out_features, -(-spec.in_features // block)
    padded = torch.zeros(n, blocks * block, dtype=torch.uint8)
    padded[:, : spec.in_features] = values
    columns = padded.view(n, blocks, block // 8 * bits, 8 // bits)
    packed = columns[..., 0].clone()
    for i in range(1, 8 // bits):
        packed |= columns[..., i] << (i * bits)
    attributes = {"K": spec.in_features, "N": n, "bits": bits, "block_size": block}
    constants = {
        "qweight": packed,
        "scales": _blocks(scales, spec, block).reshape(-1),
        "zeros": _blocks(zeros.float(), spec, block).reshape(-1),
    }
    return {**attributes, "accuracy_level": 1}, constants  # 1: products in fp32


def _blocks(per_group: torch.Tensor, spec: QuantSpec, block: int) -> torch.Tensor:
    if spec.num_groups == 1:  # the group may be shorter than whole blocks
        return per_group.t().expand(-1, -(-spec.in_features // block)).contiguous()
    return regroup(per_group, spec, block)


def check(source: QuantizedCheckpoint) -> dict[str, str]:
    """Layers that become dense, and why; see `obstacles`."""
    return obstacles(source, obstacle, "onnx")


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`.

    Raises:
        CheckpointError: onnxruntime-genai cannot build the architecture.
    """
    onnx = require("onnx", "onnx")
    require("onnxruntime_genai", "onnx")
    require("onnx_ir", "onnx")
    directory = AtomicDirectory(out)
    checkpoint = open_quantized(source)
    reasons = check(checkpoint)
    with directory as partial:
        work = partial / "build"
        _build(checkpoint, work)
        model = onnx.load(str(work / "graph" / MODEL_FILE), load_external_data=False)
        _rewrite(checkpoint, model, work / "graph", partial, reasons, progress)
        for path in (work / "graph").iterdir():
            if path.name not in (MODEL_FILE, DATA_FILE):
                shutil.move(path, partial / path.name)
        shutil.rmtree(work)
    layers = len(checkpoint.layers) - len(reasons)
    return ExportResult(directory.target, "onnx", layers, EXACTNESS, reasons)


class _Dense:
    """`LayerFormat` that holds no layer as integers."""

    name = "onnx"

    def dense_dtype(self, info: TensorInfo) -> torch.dtype:
        return info.dtype

    def obstacle(self, spec: QuantSpec, act_order: bool) -> str | None:
        return "dense"

    def plan(self, name: str, spec: QuantSpec) -> TensorPlan:
        return {}

    def convert(self, name: str, spec: QuantSpec, layer: PackedWeight) -> dict[str, torch.Tensor]:
        return {}


def _build(source: QuantizedCheckpoint, work: Path) -> None:
    """Let the builder make a graph in fp32 under `work`/graph."""
    config = with_legacy_rope(dense_config(source))
    everything = dict.fromkeys(source.layers, "dense")
    write_directory(
        source, work / "dense", _Dense(), config, everything, {"format": "pt"}, progress=None
    )
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    paths = ["-i", work / "dense", "-o", work / "graph", "-c", work / "cache"]
    options = ["-p", "fp32", "-e", "cpu", "--extra_options", "hf_token=false"]
    done = subprocess.run(
        [*command, *map(str, paths), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode or not (work / "graph" / MODEL_FILE).exists():
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise CheckpointError(
            f"{source.directory}: onnxruntime-genai's builder could not make a graph of it:\n{tail}"
        )


def _layers_of(node_name: str) -> list[str]:
    """The layers whose outputs, side by side, a product of the builder's graph computes."""
    match = _PRODUCT.match(node_name)
    if match is None:
        return ["lm_head"] if node_name == "/lm_head/MatMul" else []
    index, part, name = match.groups()
    names = ["q_proj", "k_proj", "v_proj"] if name == "qkv_proj" else [name]
    if name == "gate_up_proj":
        names = ["gate_proj", "up_proj"]
    return [f"model.layers.{index}.{'self_attn' if part == 'attn' else part}.{n}" for n in names]


def _rewrite(
    source: QuantizedCheckpoint,
    model: Any,
    graph_dir: Path,
    out: Path,
    reasons: dict[str, str],
    progress: Progress | None,
) -> None:
    """Replace the products and write graph and data, one layer in memory at a time."""
    wanted = set(source.layers) - set(reasons)
    replaced: dict[str, list[str]] = {}  # initializer -> layers
    for node in model.graph.node:
        names = _layers_of(node.name) if node.op_type == "MatMul" else []
        # a fused product with one dense part stays dense as a whole
        if names and wanted.issuperset(names):
            replaced[node.input[1]] = names
    lost = wanted - {name for names in replaced.values() for name in names}
    if lost:
        raise CheckpointError(
            f"{source.directory}: onnxruntime-genai's graph has no product of its own for "
            f"{min(lost)}: this model cannot be exported to onnx."
        )
    initializers = list(model.graph.initializer)
    del model.graph.initializer[:]
    attributes: dict[str, list[dict[str, int]]] = {}
    with (graph_dir / DATA_FILE).open("rb") as old, (out / DATA_FILE).open("wb") as new:
        for done, initializer in enumerate(initializers, start=1):
            if initializer.name not in replaced:
                model.graph.initializer.append(_copied(initializer, old, new))
            for name in replaced.get(initializer.name, []):
                terms = matmul_nbits(source.layer(name), source.layers[name])
                attributes[name] = [term[0] for term in terms]
                for i, (_, constants) in enumerate(terms):
                    model.graph.initializer.extend(_written(f"{name}.{i}", constants, new))
            if progress is not None:
                progress(done, len(initializers))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        names = replaced.get(node.input[1], []) if node.op_type == "MatMul" else []
        model.graph.node.extend(_products(node, names, attributes) if names else [node])
    (out / MODEL_FILE).write_bytes(model.SerializeToString())


def _products(
    node: Any, names: list[str], attributes: dict[str, list[dict[str, int]]]
) -> Iterator[Any]:
    """The nodes in place of one product: terms summed, layers side by side."""
    from onnx import helper

    parts = []
    for name in names:
        terms = []
        for i, values in enumerate(attributes[name]):
            terms.append(f"/{name}/MatMulNBits_{i}")
            constants = [f"{name}.{i}.{part}" for part in ("qweight", "scales", "zeros")]
            yield helper.make_node(
                "MatMulNBits",
                [node.input[0], *constants],
                [f"{terms[-1]}/output"],
                terms[-1],
                domain=DOMAIN,
                **values,
            )
        outputs = [f"{term}/output" for term in terms]
        parts.append(outputs[0])
        if len(outputs) > 1:
            parts[-1] = f"/{name}/Sum/output"
            yield helper.make_node("Sum", outputs, [parts[-1]], f"/{name}/Sum")
    # also of one part: it gives the output its name
    yield helper.make_node("Concat", parts, node.output, f"{node.name}/Concat", axis=-1)


def _copied(initializer: Any, old: BinaryIO, new: BinaryIO) -> Any:
    """An initializer with its data in the new file."""
    result = copy.deepcopy(initializer)
    if not initializer.external_data:
        return result
    place = {entry.key: entry.value for entry in initializer.external_data}
    old.seek(int(place["offset"]))
    left = int(place["length"])
    start = _aligned(new)
    while left:
        chunk = old.read(min(left, _COPY_BYTES))
        new.write(chunk)
        left -= len(chunk)
    _place(result, start, int(place["length"]))
    return result


def _written(name: str, tensors: dict[str, torch.Tensor], new: BinaryIO) -> Iterator[Any]:
    from onnx import TensorProto

    types = {torch.uint8: TensorProto.UINT8, torch.float32: TensorProto.FLOAT}
    for part, tensor in tensors.items():
        start = _aligned(new)
        new.write(tensor.contiguous().numpy().tobytes())
        result = TensorProto(
            name=f"{name}.{part}", data_type=types[tensor.dtype], dims=tensor.shape
        )
        _place(result, start, tensor.nbytes)
        yield result


def _aligned(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % _ALIGNMENT))
    return file.tell()


def _place(initializer: Any, start: int, length: int) -> None:
    from onnx import TensorProto

    del initializer.external_data[:]
    for key, value in (("location", DATA_FILE), ("offset", start), ("length", length)):
        initializer.external_data.add(key=key, value=str(value))
    initializer.data_location = TensorProto.EXTERNAL
