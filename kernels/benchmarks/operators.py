"""Every operator on one layer, beside its peers: who is measured, on what, and what it moves."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import measure
import torch
import worker
from measure import Row
from torch.nn.functional import linear as dense_linear

from qalora_kernels import LowRank, PackedWeight, QuantSpec, folded_linear, ops, quantized_linear

DTYPE = torch.bfloat16
# bytes of packed weights that take turns, so that no cache holds the next one
ROTATION = {"cpu": 100 << 20, "cuda": 256 << 20}


@dataclass
class Layer:
    """One layer of random numbers, packed and dense [N, K]."""

    weight: PackedWeight
    dense: torch.Tensor

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of integers, scales and offsets."""
        return sum(tensor.nbytes for tensor in self.weight.tensors if tensor is not None)


def random_weight(spec: QuantSpec, device: str | torch.device) -> PackedWeight:
    """Return random integers; scales and offsets have the dtypes that the plugin holds."""
    shape, grid = (spec.packed_rows, spec.out_features), (spec.num_groups, spec.out_features)
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
    scales = torch.full(grid, 0.01, dtype=spec.scales_dtype, device=device)
    offsets = torch.zeros(grid, dtype=spec.offsets_dtype, device=device)
    return PackedWeight(words, scales, offsets, None, spec)


def rotated_layers(spec: QuantSpec, device: str) -> list[Layer]:
    """Return as many layers as no cache holds, at least 2 and at most 64."""

    def layer() -> Layer:
        shape = (spec.out_features, spec.in_features)
        return Layer(random_weight(spec, device), torch.randn(shape, device=device, dtype=DTYPE))

    first = layer()
    count = min(64, max(2, -(-ROTATION[device] // first.packed_bytes)))
    return [first] + [layer() for _ in range(count - 1)]


def rotation(function: Callable[[Any], Any], arguments: list[Any]) -> Callable[[], Any]:
    """Return a function that calls `function` with the next of several arguments each time."""
    turns = itertools.cycle(arguments)
    return lambda: function(next(turns))


def tinygemm(layers: list[Layer], x: torch.Tensor) -> Callable[[], Any]:
    """Return torch's int4 matrix product; scales and zeros are bf16."""
    spec, aten = layers[0].weight.spec, torch.ops.aten
    if spec.bits != 4:
        raise NotImplementedError("4 bits only")
    k, n = spec.in_features, spec.out_features
    grid = torch.full((spec.num_groups, n, 2), 0.01, dtype=DTYPE, device=x.device)
    if x.device.type == "cpu":
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        pack, multiply = aten._convert_weight_to_int4pack_for_cpu, aten._weight_int4pack_mm_for_cpu
        packed = [(pack(codes, 1), grid.clone()) for _ in layers]
    else:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device)
        multiply = aten._weight_int4pack_mm
        packed = [(aten._convert_weight_to_int4pack(codes, 8), grid.clone()) for _ in layers]
    return rotation(lambda p: multiply(x, p[0], spec.group_size, p[1]), packed)


def gemlite(layers: list[Layer], x: torch.Tensor) -> Callable[[], Any]:
    """Return gemlite's fused product (CUDA); it tunes for long at first use."""
    from gemlite.core import DType, GemLiteLinear

    spec, bf16 = layers[0].weight.spec, DType.BF16
    k, n = spec.in_features, spec.out_features
    built = []
    for _ in layers:
        codes = torch.randint(0, 1 << spec.bits, (n, k), dtype=torch.uint8, device=x.device)
        grid = torch.full((n * spec.num_groups, 1), 0.01, dtype=DTYPE, device=x.device)
        module = GemLiteLinear(
            spec.bits, spec.group_size, k, n, input_dtype=bf16, output_dtype=bf16
        )
        module.pack(codes, grid, torch.zeros_like(grid), None)
        built.append(module)
    return rotation(lambda module: module(x), built)


PEERS = {"tinygemm": tinygemm, "gemlite": gemlite}


def lora(layer: Layer, rank: int) -> torch.nn.Module:
    """Return PEFT's LoRA on the dense layer, bf16 throughout."""
    module = torch.nn.Linear(*reversed(layer.dense.shape), bias=False, device="meta")
    module.weight = torch.nn.Parameter(layer.dense, requires_grad=False)
    model = torch.nn.Sequential(OrderedDict(q_proj=module))
    return worker.lora(model, {"r": rank}).base_model.model


# ---- the operators


@dataclass
class Work:
    """An operator's variants, and what it has to do."""

    operator: str
    functions: measure.Functions
    moved: int  # bytes read and written, without the weights
    flops: int
    passes: int = 0  # times that the weights are read

    def fractions(self, variant: str, layer: Layer, seconds: float, limits: Row) -> Row:
        """Return the bytes moved, and the fractions of the copy bandwidth and product rate."""
        dense = variant in ("dense", "lora")
        moved = self.moved + self.passes * (layer.dense.nbytes if dense else layer.packed_bytes)
        copied = moved / seconds / limits["copy_bytes_per_s"]
        multiplied = self.flops / seconds / limits["gemm_flop_per_s"]
        return {
            "dtype": "bfloat16",
            "bytes_moved": moved,
            "copy_fraction": round(copied, 3),
            "gemm_fraction": round(multiplied, 3),
        }


def works(layers: list[Layer], x: torch.Tensor, dy: torch.Tensor, rank: int) -> Iterator[Work]:
    """Yield the product, which peers join, and then all other operators on the rows of x."""
    spec, m, item = layers[0].weight.spec, x.shape[0], DTYPE.itemsize
    k, n, g, size = spec.in_features, spec.out_features, spec.num_groups, spec.group_size
    io, sums, flops = (m * k + m * n) * item, g * n * 4, 2 * m * n * k

    def turns(function: Callable[[Layer], Any]) -> Callable[[], Any]:
        return rotation(function, layers)

    product = turns(lambda layer: quantized_linear(x, layer.weight, None))
    dense = turns(lambda layer: dense_linear(x, layer.dense))
    yield Work("linear", {"qalora": product, "dense": dense}, io, flops, 1)
    a = torch.randn(rank, g, device=x.device, requires_grad=True)
    change = LowRank(a, torch.zeros(n, rank, device=x.device, requires_grad=True), 0.25)
    if m == 1:  # the operators that no activation enters
        dequantize = turns(lambda layer: layer.weight.dequantize(DTYPE))
        yield Work("dequantize", {"qalora": dequantize}, k * n * item, 0, 1)
        folding = turns(lambda layer: layer.weight.fold(change, None))
        yield Work("fold", {"qalora": folding}, 3 * sums, 2 * g * n * rank)
        return
    pool = {"qalora": lambda: ops.pool(x, None, size)}
    yield Work("pool", pool, m * (k + g) * item, m * k)
    to_input = turns(lambda layer: ops.grad_input(dy, layer.weight))
    dense = turns(lambda layer: dy @ layer.dense)
    yield Work("grad_input", {"qalora": to_input, "dense": dense}, io, flops, 1)
    pooled = ops.pool(x, None, size)
    to_pooled = {"qalora": lambda: ops.pooled_grad(dy, pooled)}
    yield Work("pooled_grad", to_pooled, m * (n + g) * item + sums, 2 * m * n * g)
    to_groups = turns(lambda layer: ops.weighted_group_grad(dy, x, layer.weight))
    yield Work("weighted_group_grad", {"qalora": to_groups}, io + sums, flops, 1)

    def step(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        call(x.detach().requires_grad_()).backward(dy)

    steps = {
        "qalora": turns(
            lambda layer: step(lambda x: folded_linear(x, layer.weight, None, zeros=change))
        ),
        "dense": turns(lambda layer: step(lambda x: dense_linear(x, layer.dense))),
        "lora": rotation(step, [lora(layer, rank) for layer in layers]),
    }
    yield Work(f"linear forward+backward, r={rank}", steps, 2 * io, 2 * flops, 2)


@dataclass(frozen=True)
class Settings:
    """How operators are measured; `peers` are names of `PEERS`."""

    device: str
    limits: Row
    rounds: int
    rank: int
    peers: list[str]
    only_linear: bool = False  # the product alone, on a GPU as CUDA graphs: without Python


def run(spec: QuantSpec, rows: list[int], settings: Settings) -> Iterator[Row]:
    """Measure every operator on one shape for each M of `rows`.

    Yields:
        Rows: one a variant, one a ratio "qalora / variant", one a peer that cannot run.
    """
    device, layers = settings.device, rotated_layers(spec, settings.device)
    k, n = spec.in_features, spec.out_features
    base: Row = {"K": k, "N": n, "bits": spec.bits, "group_size": spec.group_size}
    base |= {"timing": "graph"} if settings.only_linear else {}
    for m in rows:
        x, dy = (torch.randn(m, width, device=device, dtype=DTYPE) for width in (k, n))
        for work in works(layers, x, dy, settings.rank):
            row = {"operator": work.operator, "M": m} | base
            with torch.set_grad_enabled("backward" in work.operator):
                if work.operator == "linear":
                    yield from add_peers(work, layers, x, settings, row)
                times = measure.interleave(work.functions, settings.rounds, device)
            more = {}
            for variant, samples in times.items():
                if settings.only_linear:  # one call went through all layers
                    times[variant] = samples = [sample / len(layers) for sample in samples]
                more[variant] = {"rounds": settings.rounds}
                more[variant] |= work.fractions(
                    variant, layers[0], median(samples), settings.limits
                )
            yield from measure.rows_of(row, times, more)
            if settings.only_linear:
                break


def add_peers(
    work: Work, layers: list[Layer], x: torch.Tensor, settings: Settings, row: Row
) -> Iterator[Row]:
    """Add the peers to the product, and yield a row for each that cannot run."""

    def prepared(function: Callable[[], Any]) -> Callable[[], Any]:
        if settings.only_linear:
            return measure.graphed(function, len(layers), settings.device)
        return function

    work.functions = {name: prepared(function) for name, function in work.functions.items()}
    for name in settings.peers:
        try:
            function = prepared(PEERS[name](layers, x))
            function()
            work.functions[name] = function
        except Exception as error:  # a peer's failure is a result, not ours to raise
            yield row | {"variant": name, "not_run": measure.first_line(error)}
