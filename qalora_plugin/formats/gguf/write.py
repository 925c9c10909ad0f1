"""One GGUF file for llama.cpp and all that is built on it.

A layer of at most 4 bits becomes Q4_1 (ggml-common.h, `block_q4_1`): blocks of 32 inputs, an f16
scale d and an f16 minimum m, W = d * code + m; byte i of a block holds the codes of inputs i (low
bits) and i + 16. d is our scale, up to its sign; m = offsets - d * (code of the offset) is rounded
to f16, the only rounding. q may count up or down and, below 4 bits, start anywhere: each group
takes the way whose minimum rounds least. Of a checkpoint with offsets_at "minimum" m is an f16
number as it is, and nothing is rounded.
A layer that blocks of 32 cannot hold, or of 8 bits (no type has 8 bits and a minimum), becomes F16.
With `exact` everything is F32, and so are llama.cpp's products: GGUF's other types round the
minimum too, or the weights, and with them activations. Otherwise norms are F32, and other dense
tensors keep their dtype.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qalora_kernels import PackedWeight, QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...errors import CheckpointError, ConfigError
from ...files.atomic import atomic_file, check_target
from ..record import GGUF_KEY, describe_source
from ..walk import ExportResult, Progress, codes, dense, regroup, require
from .metadata import Metadata
from .tokenizer import Tokenizer

BLOCK = 32
TOP_CODE = 15
WANTED = 2e-3  # of a step: a minimum that rounds by more is counted
_BYTES = 20  # of a Q4_1 block: d, m, 16 bytes of codes


def obstacle(spec: QuantSpec, act_order: bool, exact: bool = False) -> str | None:
    """Why a layer becomes dense, or None where Q4_1 holds it."""
    if exact:
        return "fp32 was asked for"
    if spec.bits > 4:
        return f"GGUF has no type with {spec.bits} bits and an offset; written as F16"
    if act_order:
        return "its groups follow act-order (g_idx), GGUF's blocks are neighbours; written as F16"
    if math.gcd(spec.group_size, spec.in_features) % BLOCK:
        return (
            f"groups of {spec.group_size} in {spec.in_features} inputs cannot be cut into whole "
            f"blocks of {BLOCK}; written as F16"
        )
    return None


@dataclass
class Block:
    """How q goes into Q4_1: code = start + sign * q, W = scale * code + minimum.

    All are [G, N]; `error` is the rounding of the minimum in steps.
    """

    scale: torch.Tensor
    minimum: torch.Tensor
    start: torch.Tensor
    sign: torch.Tensor
    error: torch.Tensor


def least_rounding(layer: PackedWeight, spec: QuantSpec) -> Block:
    """Among all ways to put q into 0..15, upwards or downwards, the one whose minimum rounds least.

    Raises:
        CheckpointError: a minimum that f16 does not hold.
    """
    scales, offsets = layer.scales.double(), layer.offsets.double()
    top = (1 << spec.bits) - 1
    best: Block | None = None
    for sign in (1, -1):
        for shift in range(TOP_CODE - top + 1):
            start = shift if sign > 0 else top + shift
            exact = offsets - scales * (sign * start + spec.mid)
            minimum = exact.to(torch.float16)
            error = (minimum.double() - exact).abs() / scales
            found = Block(
                layer.scales * sign,
                minimum,
                torch.full_like(minimum, start, dtype=torch.int8),
                torch.full_like(minimum, sign, dtype=torch.int8),
                error,
            )
            if best is not None:
                less = error < best.error
                for name, value in vars(found).items():
                    setattr(found, name, torch.where(less, value, getattr(best, name)))
            best = found
    assert best is not None
    if not best.error.isfinite().all():
        raise CheckpointError("a minimum is out of the range of f16, which GGUF stores")
    return best


@dataclass
class Rounding:
    """How far minima were rounded, in steps (scales), over all groups."""

    largest: float = 0.0
    total: float = 0.0
    above: int = 0
    groups: int = 0

    def add(self, error: torch.Tensor) -> None:
        """Count one layer's [G, N]."""
        self.largest = max(self.largest, error.max().item())
        self.total += error.sum().item()
        self.above += int((error > WANTED).sum())
        self.groups += error.numel()

    def as_text(self) -> str:
        """For people."""
        if self.largest == 0:
            return "Exact: integers, scales and minima, bit for bit."
        share = 100 * self.above / self.groups
        return (
            f"Integers and scales are exact; minima are rounded to f16: by at most "
            f"{self.largest:.1e} of a step, {self.total / self.groups:.1e} in the mean, "
            f"{share:.1f}% of groups above {WANTED:g}."
        )


def q4_1(layer: PackedWeight, spec: QuantSpec) -> torch.Tensor:
    """A layer as Q4_1 blocks, uint8 [N, K / 32 * 20]."""
    block = least_rounding(layer, spec)
    n, blocks = spec.out_features, spec.in_features // BLOCK
    values = codes(layer, spec).view(torch.int8).view(n, blocks, BLOCK)
    values = values * regroup(block.sign, spec, BLOCK).unsqueeze(2)
    values += regroup(block.start, spec, BLOCK).unsqueeze(2)
    halves = values.view(torch.uint8).view(n, blocks, 2, BLOCK // 2)
    out = torch.empty(n, blocks, _BYTES, dtype=torch.uint8)
    for at, numbers in ((0, block.scale.to(torch.float16)), (2, block.minimum)):
        out[:, :, at : at + 2] = regroup(numbers, spec, BLOCK).view(torch.uint8).view(n, blocks, 2)
    out[:, :, 4:] = halves[:, :, 0] | (halves[:, :, 1] << 4)
    return out.view(n, blocks * _BYTES)


@dataclass
class _Export:
    """One export in progress."""

    source: QuantizedCheckpoint
    metadata: Metadata
    reasons: dict[str, str]
    names: dict[str, str]
    dense_dtype: torch.dtype
    rounding: Rounding


def export(
    source: str | Path, out: str | Path, *, progress: Progress | None, exact: bool = False
) -> ExportResult:
    """Write the file; see `export_model`."""
    gguf = require("gguf", "gguf")
    target = check_target(out)
    if target.suffix != ".gguf":
        raise ConfigError(f"{target}: expected the name of a file that ends in .gguf")
    checkpoint = open_quantized(source)
    metadata, tokenizer, names = check(checkpoint)
    act_order = checkpoint.config.desc_act
    found = {name: obstacle(spec, act_order, exact) for name, spec in checkpoint.layers.items()}
    reasons = {name: why for name, why in found.items() if why is not None}
    dtype = torch.float32 if exact else torch.float16
    rounding = _measure(checkpoint, reasons)
    state = _Export(checkpoint, metadata, reasons, names, dtype, rounding)
    with atomic_file(target) as partial:
        writer = gguf.GGUFWriter(partial, metadata.architecture.name)
        _add_general(writer, state, gguf)
        metadata.add_to(writer)
        tokenizer.add_to(writer, gguf)
        _write_tensors(writer, state, gguf, progress)
        writer.close()
    layers = len(checkpoint.layers) - len(reasons)
    if exact:
        exactness = "Exact to the rounding of fp32, in which everything is stored."
    else:
        exactness = rounding.as_text() if layers else "Weights are rounded to f16."
    return ExportResult(target, "gguf", layers, exactness, reasons)


def check(source: QuantizedCheckpoint) -> tuple[Metadata, Tokenizer, dict[str, str]]:
    """What the file will say of the model; see `tensor_names`.

    Raises:
        CheckpointError: llama.cpp has not its architecture, tokenizer, or a tensor.
    """
    metadata = Metadata(source.directory)
    tokenizer = Tokenizer(source.directory, metadata.config.vocab_size)
    return metadata, tokenizer, tensor_names(source, metadata, require("gguf", "gguf"))


def _measure(source: QuantizedCheckpoint, reasons: dict[str, str]) -> Rounding:
    """How far the minima of all Q4_1 layers will be rounded.

    Raises:
        CheckpointError: a minimum that f16 does not hold.
    """
    rounding = Rounding()
    for name, spec in source.layers.items():
        if name in reasons:
            continue
        try:
            rounding.add(least_rounding(source.layer(name), spec).error)
        except CheckpointError as error:
            raise CheckpointError(f"{source.directory}: {name}: {error}") from error
    return rounding


def tensor_names(
    source: QuantizedCheckpoint, metadata: Metadata, gguf: ModuleType
) -> dict[str, str]:
    """GGUF's name by the source's, in the order of its files; a layer is its `qweight`.

    Raises:
        CheckpointError: llama.cpp has no place for a tensor.
    """
    architecture = metadata.architecture.name
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, metadata.config.num_hidden_layers)
    tied = bool(metadata.config.tie_word_embeddings)
    other = set(source.dense_names)
    names = {}
    for tensor in source.reader.tensors:
        layer, _, part = tensor.rpartition(".")
        if tensor not in other and part != "qweight":
            continue
        wanted = tensor if tensor in other else f"{layer}.weight"
        if tied and wanted == "lm_head.weight":
            continue  # a copy of the embedding
        name = table.get_name(wanted, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(
                f"{source.directory}: llama.cpp's {architecture} has no place for the tensor "
                f"{tensor}."
            )
        names[tensor] = name
    return names


def _add_general(writer: Any, state: _Export, gguf: ModuleType) -> None:
    source = state.source
    mostly = gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.directory.resolve().name)
    writer.add_quantized_by("qalora-plugin")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    facts = describe_source(source)
    if state.rounding.groups:
        facts["exactness"] = state.rounding.as_text()
    writer.add_string(GGUF_KEY, json.dumps(facts))
    if len(state.reasons) < len(source.layers):
        writer.add_file_type(mostly.MOSTLY_Q4_1)
    else:
        exact = state.dense_dtype == torch.float32
        writer.add_file_type(mostly.ALL_F32 if exact else mostly.MOSTLY_F16)


def _write_tensors(
    writer: Any, state: _Export, gguf: ModuleType, progress: Progress | None
) -> None:
    types = gguf.GGMLQuantizationType
    by_dtype = {
        torch.float32: types.F32,
        torch.float16: types.F16,
        torch.bfloat16: types.BF16,
    }
    factors = state.metadata.rope_factors()
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.float32, factors.nbytes)
    for tensor, name in state.names.items():
        shape, dtype = _stored(state, tensor)
        kind = types.Q4_1 if dtype is None else by_dtype[dtype]
        nbytes = math.prod(shape) if dtype is None else math.prod(shape) * dtype.itemsize
        byte_shape = shape if dtype is None else (*shape[:-1], shape[-1] * dtype.itemsize)
        writer.add_tensor_info(name, byte_shape, np.uint8, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for done, tensor in enumerate(state.names, start=1):
        writer.write_tensor_data(_data(state, tensor).contiguous().view(torch.uint8).numpy())
        if progress is not None:
            progress(done, len(state.names))


def _stored(state: _Export, tensor: str) -> tuple[tuple[int, ...], torch.dtype | None]:
    """Shape and dtype of a tensor in the file; None and a shape in bytes for Q4_1."""
    layer = tensor.removesuffix(".qweight")
    spec = state.source.layers.get(layer) if tensor.endswith(".qweight") else None
    if spec is None:
        info = state.source.reader.info(tensor)
        if info.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{info.file}: {tensor}: GGUF does not hold {info.dtype} here.")
        wide = len(info.shape) == 1 or state.dense_dtype == torch.float32
        return info.shape, torch.float32 if wide else info.dtype
    if layer in state.reasons:
        return (spec.out_features, spec.in_features), state.dense_dtype
    return (spec.out_features, spec.in_features // BLOCK * _BYTES), None


def _data(state: _Export, tensor: str) -> torch.Tensor:
    """One tensor as it is stored."""
    source, metadata = state.source, state.metadata
    _, dtype = _stored(state, tensor)
    order = metadata.rows(tensor)
    layer = tensor.removesuffix(".qweight")
    if not tensor.endswith(".qweight") or layer not in source.layers:
        value = source.reader.get(tensor)
        if metadata.architecture.norm_plus_one and tensor.endswith("norm.weight"):
            value = value.float() + 1
        return order(value).to(dtype)
    spec, numbers = source.layers[layer], source.layer(layer)
    if layer not in state.reasons:
        return order(q4_1(numbers, spec))
    weight = dense(numbers, spec).to(state.dense_dtype)
    if not weight.isfinite().all():
        raise CheckpointError(f"{source.directory}: {layer}: a weight is out of the range of f16")
    return order(weight)
