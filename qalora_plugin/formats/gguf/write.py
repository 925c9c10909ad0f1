"""Write one GGUF file for llama.cpp and all that is built on it.

A layer of at most 4 bits becomes Q4_1 (see `blocks`). A layer that blocks of 32 cannot hold, or of
8 bits (no type has 8 bits and a minimum), becomes F16. With `exact` everything is F32, and so are
llama.cpp's products: GGUF's other types round the minimum too, or the weights, and with them
activations. Otherwise norms and routers are F32, and other dense tensors keep their dtype. A
mixture's experts are one tensor [E, N, K] for each projection.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...errors import CheckpointError, ConfigError
from ...files.atomic import atomic_file, check_space, check_target
from ...files.reader import all_finite
from ..directory import dense_weight
from ..export import ExportResult, Progress, obstacles
from ..record import describe_source
from ..stacks import expert_stacks
from . import FORMAT
from .blocks import BLOCK, BLOCK_BYTES, Rounding, q4_1
from .metadata import Metadata
from .record import EXACT, SOURCE_KEY
from .tokenizer import Tokenizer

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export(
    source: str | Path, out: str | Path, *, progress: Progress | None, exact: bool = False
) -> ExportResult:
    """Write the file; see `export_model`. With `exact` every layer becomes F32."""
    gguf = FORMAT.library("gguf")
    target = check_target(out)
    if target.suffix != FORMAT.suffix:
        raise ConfigError(f"{target}: expected the name of a file that ends in .gguf")
    checkpoint = open_quantized(source)
    metadata, tokenizer, names = check(checkpoint)
    reasons = obstacles(checkpoint, FORMAT)
    if exact:
        reasons = dict.fromkeys(checkpoint.layers, "fp32 was asked for")
    state = _Export(checkpoint, metadata, reasons, torch.float32 if exact else torch.float16)
    rounding = _measure(checkpoint, reasons)
    check_space(target.parent, sum(math.prod(state.in_bytes(name)[0]) for name in names))
    with atomic_file(target) as partial:
        writer = gguf.GGUFWriter(partial, metadata.architecture.name)
        _add_general(writer, state, rounding)
        metadata.add_to(writer)
        tokenizer.add_to(writer, gguf)
        _write_tensors(writer, state, names, progress)
        writer.close()
    layers = len(checkpoint.layers) - len(reasons)
    exactness = rounding.as_text() if layers else "Weights are rounded to f16."
    if exact:
        exactness = EXACT
    return ExportResult(target, FORMAT.name, layers, exactness, reasons)


def check(source: QuantizedCheckpoint) -> tuple[Metadata, Tokenizer, dict[str, str]]:
    """Return what the file will say of the model, and the names of its tensors there.

    Raises:
        CheckpointError: llama.cpp has not its architecture, tokenizer, or a tensor; or it is a GGUF
            file.
    """
    if source.format == FORMAT.name:
        raise CheckpointError(
            f"{source.directory}: is a GGUF file already. To have its layers in Q4_1, `qalora "
            "import` it, and export what that makes."
        )
    metadata = Metadata(source)
    tokenizer = Tokenizer(source.directory, metadata.config.vocab_size)
    return metadata, tokenizer, metadata.tensor_names(source)


def is_router(name: str) -> bool:
    """Say whether a tensor is a mixture's router, whose products decide and are not rounded."""
    return name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))


@dataclass
class _Export:
    """One export: which layers become dense, and in which dtype."""

    source: QuantizedCheckpoint
    metadata: Metadata
    reasons: dict[str, str]
    dense_dtype: torch.dtype

    def stored(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Return a tensor's shape and dtype in the file; for Q4_1 None and the shape in bytes."""
        layer = name.removesuffix(".weight")
        spec = self.source.layers.get(layer)
        if spec is None or layer == name:
            info = self.source.reader.info(name)
            if info.dtype not in _DTYPES:
                raise CheckpointError(f"{info.file}: {name}: GGUF does not hold {info.dtype} here.")
            shape = (info.shape[1],) if info.shape[:-1] == (1,) else info.shape  # a shared gate
            wide = len(shape) == 1 or is_router(name) or self.dense_dtype == torch.float32
            return shape, torch.float32 if wide else info.dtype
        if layer in self.reasons:
            return (spec.out_features, spec.in_features), self.dense_dtype
        return (spec.out_features, spec.in_features // BLOCK * BLOCK_BYTES), None

    def in_bytes(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape with the last axis in bytes, and its type in GGUF."""
        shape, dtype = self.stored(name)
        kind, width = ("Q4_1", 1) if dtype is None else (_DTYPES[dtype], dtype.itemsize)
        return (*shape[:-1], shape[-1] * width), kind

    def data(self, name: str) -> torch.Tensor:
        """Return one tensor as it is stored."""
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.source.layers:
            value = self.source.reader.get(name)
            if self.metadata.architecture.norm_plus_one and name.endswith("norm.weight"):
                value = value.float() + 1
            shape, dtype = self.stored(name)
            value = value.to(dtype).view(shape)
        elif layer not in self.reasons:
            value = q4_1(self.source.layer(layer))
        else:
            value = dense_weight(self.source.layer(layer)).to(self.dense_dtype)
            if not all_finite(value):
                raise CheckpointError(
                    f"{self.source.directory}: {layer}: a weight is out of the range of f16"
                )
        return self.metadata.in_pairs(name, value)


def _measure(source: QuantizedCheckpoint, reasons: dict[str, str]) -> Rounding:
    """Measure how far the minima of all Q4_1 layers will be rounded."""
    rounding = Rounding()
    for name in source.layers:
        if name in reasons:
            continue
        try:
            rounding.add(source.layer(name))
        except CheckpointError as error:
            raise CheckpointError(f"{source.directory}: {name}: {error}") from error
    return rounding


def _add_general(writer: Any, state: _Export, rounding: Rounding) -> None:
    gguf = FORMAT.library("gguf")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(state.source.directory.resolve().name)
    writer.add_quantized_by("qalora-plugin")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    facts = describe_source(state.source)
    if rounding.groups:
        facts["exactness"] = rounding.as_text()
    writer.add_string(SOURCE_KEY, json.dumps(facts))
    kind = "ALL_F32" if state.dense_dtype == torch.float32 else "MOSTLY_F16"
    if len(state.reasons) < len(state.source.layers):
        kind = "MOSTLY_Q4_1"
    writer.add_file_type(gguf.LlamaFileType[kind])


def _write_tensors(
    writer: Any, state: _Export, names: dict[str, str], progress: Progress | None
) -> None:
    types = FORMAT.library("gguf").GGMLQuantizationType
    factors = state.metadata.rope_factors()
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.float32, factors.nbytes)
    stacks = {found[0]: found for found in expert_stacks(state.source).values()}
    inside = {layer for found in stacks.values() for layer in found[1:]}
    names = {n: written for n, written in names.items() if n.removesuffix(".weight") not in inside}
    for name, written in names.items():
        in_bytes, kind = state.in_bytes(name)
        experts = stacks.get(name.removesuffix(".weight"))
        in_bytes = in_bytes if experts is None else (len(experts), *in_bytes)
        writer.add_tensor_info(
            written, in_bytes, np.uint8, math.prod(in_bytes), raw_dtype=types[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for done, name in enumerate(names, start=1):
        layers = stacks.get(name.removesuffix(".weight"))
        parts = [name] if layers is None else [f"{layer}.weight" for layer in layers]
        data = torch.cat([state.data(part).contiguous().view(torch.uint8) for part in parts])
        writer.write_tensor_data(data.numpy())
        if progress is not None:
            progress(done, len(names))
