"""Write ONNX Runtime directories with a KV cache, for onnxruntime-genai.

onnxruntime-genai's own builder makes the graph from the model in fp32; then the product of every
quantized layer is replaced by `MatMulNBits` (onnxruntime, ContribOperators.md, com.microsoft):

    B            uint8 [N, blocks, block * bits / 8]   low bits first; 3 bits in 4, 8 as two times 4
    scales       fp32  [N * blocks]
    zero_points  fp32  [N * blocks]   2^(bits-1) - offsets / scales, real-valued

Weights of everything else stay fp32. The builder holds the model in fp32 while it runs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ...errors import CheckpointError
from ...files.atomic import AtomicDirectory
from ..directory import (
    DenseLayers,
    regroup,
    without_zero_scales,
    write_directory,
)
from ..export import ExportResult, Progress, obstacles
from ..features import NAMED, Family, all_settings, layer_kinds, read_config
from ..rope import with_legacy_rope
from . import FORMAT, MODEL_FILE
from .graph import DATA_FILE, Graph, Term

EXACTNESS = "Exact in fp32 (to its rounding, 1e-6 of a weight)."


def matmul_nbits(weight: PackedWeight) -> list[Term]:
    """Return the nodes whose sum computes a layer: one, or two for 8 bits.

    ONNX Runtime has real-valued zero-points up to 4 bits only, so 8 bits are two halves:
    W = 16 * scales * (high - zero) + scales * low.
    """
    weight = without_zero_scales(weight)
    spec, codes, scales = weight.spec, weight.codes(), weight.scales
    zeros = spec.mid - weight.offsets.double() / scales.double()
    if spec.bits < 8:
        return [_term(codes, scales, zeros, spec)]
    high = _term(codes >> 4, scales * 16, zeros / 16, spec)
    return [high, _term(codes & 15, scales, torch.zeros_like(zeros), spec)]


def _term(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, spec: QuantSpec) -> Term:
    """Return the node of scales * (codes - zeros); codes [N, K], the others [G, N]."""
    block = FORMAT.grids.block(spec)
    bits = 2 if spec.bits == 2 else 4
    n, blocks = spec.out_features, -(-spec.in_features // block)
    padded = torch.zeros(n, blocks * block, dtype=torch.uint8)
    padded[:, : spec.in_features] = codes
    columns = padded.view(n, blocks, block // 8 * bits, 8 // bits)
    packed = columns[..., 0].clone()
    for i in range(1, 8 // bits):
        packed |= columns[..., i] << (i * bits)
    attributes = {"K": spec.in_features, "N": n, "bits": bits, "block_size": block}
    constants = {
        "qweight": packed,
        "scales": regroup(scales, spec, block).reshape(-1),
        "zeros": regroup(zeros.float(), spec, block).reshape(-1),
    }
    return Term(attributes | {"accuracy_level": 1}, constants)  # 1: products in fp32


_ROPES = ("default", "llama3")  # it was seen to compute linear and yarn otherwise
_HEADS = 16  # of GroupQueryAttention with rotary embeddings
FAMILIES = {
    "llama": Family(frozenset({"attention_bias", "mlp_bias"}), ropes=_ROPES, head_sizes=_HEADS),
    **dict.fromkeys(
        ("mistral", "qwen2", "qwen3"),
        Family(windows=NAMED, ropes=_ROPES, head_sizes=_HEADS),
    ),
}


def check(source: QuantizedCheckpoint) -> Any:
    """Return transformers' config of a model that onnxruntime-genai can build and run.

    Raises:
        CheckpointError: its graph would compute something else, or cannot be run.
    """
    return read_config(source, FAMILIES, FORMAT.runs_in)


def export(source: str | Path, out: str | Path, *, progress: Progress | None) -> ExportResult:
    """Write the directory; see `export_model`.

    Raises:
        CheckpointError: onnxruntime-genai cannot build the architecture.
    """
    directory = AtomicDirectory(out)
    checkpoint = open_quantized(source)
    reasons = obstacles(checkpoint, FORMAT)
    config = check(checkpoint)
    wanted = set(checkpoint.layers) - set(reasons)
    with directory as partial:
        work = partial / "build"
        _build(checkpoint, config, work)
        graph = Graph(work / "graph", wanted)
        lost = wanted - graph.layers - graph.dense.keys()
        if lost or not graph.layers:
            raise CheckpointError(
                f"{checkpoint.directory}: onnxruntime-genai's graph has no product of its own for "
                f"{min(lost or wanted)}: this model cannot be exported to onnx."
            )
        graph.write(partial, lambda name: matmul_nbits(checkpoint.layer(name)), progress)
        for path in (work / "graph").iterdir():
            if path.name not in (MODEL_FILE, DATA_FILE):
                shutil.move(path, partial / path.name)
        shutil.rmtree(work)
    fused = "computed in one product with {}, which is dense; written in fp32"
    reasons |= {name: fused.format(other) for name, other in graph.dense.items()}
    return ExportResult(directory.target, FORMAT.name, len(graph.layers), EXACTNESS, reasons)


def _build(source: QuantizedCheckpoint, config: Any, work: Path) -> None:
    """Let the builder make a graph in fp32 under `work`/graph."""
    settings = with_legacy_rope(all_settings(config))
    settings["layer_types"] = layer_kinds(config)  # Mistral's class has no such key
    settings["dtype"] = "float32"  # the builder loads the weights in it
    write_directory(source, work / "dense", DenseLayers(), settings, {})
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    paths = ["-i", work / "dense", "-o", work / "graph", "-c", work / "cache"]
    options = [
        "-p",
        "fp32",
        "-e",
        "cpu",
        "--extra_options",
        "hf_token=false",
        "hf_remote=false",
        "windowed_kv_cache=false",
    ]
    done = subprocess.run(
        [*command, *map(str, paths), *options],
        capture_output=True,
        stdin=subprocess.DEVNULL,  # nothing may be asked there
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode or not (work / "graph" / MODEL_FILE).exists():
        tail = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise CheckpointError(
            f"{source.directory}: onnxruntime-genai's builder could not make a graph of it:\n{tail}"
        )
