"""Every operator on one layer, beside its peers: who is measured, on what, and what it moves."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from measure import first_line, interleave, ratio, spread

from qalora_kernels import LowRank, PackedWeight, QuantSpec, folded_linear, ops, quantized_linear
from qalora_plugin.quant.linear import QuantLinear

DTYPE = torch.bfloat16
# bytes of packed weights that take turns, so that no cache holds the next one
ROTATION = {"cpu": 100 << 20, "cuda": 256 << 20}


@dataclass
class Layer:
    """One quantized layer in every form that a variant needs; the numbers are random."""

    spec: QuantSpec
    packed: PackedWeight
    dense: torch.Tensor  # [N, K]

    @classmethod
    def random(cls, spec: QuantSpec, device: str) -> Layer:
        k, n = spec.in_features, spec.out_features
        held = QuantLinear(spec, device="meta")  # for the dtypes that the plugin holds
        shape = held.qweight.shape
        words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device)
        scales = torch.full_like(held.scales, 0.01, device=device)
        offsets = torch.zeros_like(held.offsets, device=device)
        dense = torch.randn(n, k, device=device, dtype=DTYPE)
        return cls(spec, PackedWeight(words, scales, offsets, None, spec), dense)

    @property
    def packed_bytes(self) -> int:
        """Integers, scales and offsets."""
        return sum(tensor.nbytes for tensor in self.packed.tensors if tensor is not None)


def rotated_layers(spec: QuantSpec, device: str) -> list[Layer]:
    """As many layers as no cache holds, two at least."""
    first = Layer.random(spec, device)
    count = max(2, -(-ROTATION[device] // first.packed_bytes))
    return [first] + [Layer.random(spec, device) for _ in range(count - 1)]


class Rotation:
    """Calls `function` with the next of several arguments each time."""

    def __init__(self, function: Callable[[Any], Any], arguments: list[Any]):
        self.function = function
        self.arguments = itertools.cycle(arguments)

    def __call__(self) -> Any:
        return self.function(next(self.arguments))


def _tinygemm(layers: list[Layer], x: torch.Tensor) -> Rotation:
    """torch's int4 matrix product; scales and zeros are bf16."""
    spec, aten = layers[0].spec, torch.ops.aten
    if spec.bits != 4:
        raise NotImplementedError("4 bits only")
    k, n = spec.in_features, spec.out_features
    grid = torch.full((spec.num_groups, n, 2), 0.01, dtype=DTYPE, device=x.device)
    if x.device.type == "cpu":
        codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
        pack, multiply = (
            aten._convert_weight_to_int4pack_for_cpu,
            aten._weight_int4pack_mm_for_cpu,
        )
        packed = [(pack(codes, 1), grid.clone()) for _ in layers]
    else:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=x.device)
        multiply = aten._weight_int4pack_mm
        packed = [(aten._convert_weight_to_int4pack(codes, 8), grid.clone()) for _ in layers]
    return Rotation(lambda p: multiply(x, p[0], spec.group_size, p[1]), packed)


def _gemlite(layers: list[Layer], x: torch.Tensor) -> Rotation:
    """gemlite's fused kernels (CUDA)."""
    from gemlite.core import DType, GemLiteLinear

    spec = layers[0].spec
    if spec.bits == 3:
        raise NotImplementedError("no 3 bits")
    k, n = spec.in_features, spec.out_features
    built = []
    for _ in layers:
        codes = torch.randint(0, 1 << spec.bits, (n, k), dtype=torch.uint8, device=x.device)
        grid = torch.full((n * spec.num_groups, 1), 0.01, dtype=DTYPE, device=x.device)
        linear = GemLiteLinear(
            spec.bits, spec.group_size, k, n, input_dtype=DType.BF16, output_dtype=DType.BF16
        )
        linear.pack(codes, grid, torch.zeros_like(grid), None)
        built.append(linear)
    return Rotation(lambda linear: linear(x), built)


def _nf4(layers: list[Layer], x: torch.Tensor) -> Rotation:
    """bitsandbytes' NF4 product, the one that QLoRA runs."""
    from bitsandbytes import functional, matmul_4bit

    packed = [functional.quantize_4bit(layer.dense, quant_type="nf4") for layer in layers]
    return Rotation(lambda p: matmul_4bit(x, p[0].t(), quant_state=p[1]), packed)


PEERS = {"tinygemm": _tinygemm, "gemlite": _gemlite, "bitsandbytes_nf4": _nf4}


def peer(
    name: str, layers: list[Layer], x: torch.Tensor
) -> tuple[Callable[[], Any] | None, str | None]:
    """The peer's function, or None and the reason why it cannot run."""
    module = {"gemlite": "gemlite", "bitsandbytes_nf4": "bitsandbytes"}.get(name)
    if module and importlib.util.find_spec(module) is None:
        return None, f"{module} is not installed"
    if name == "gemlite" and x.device.type != "cuda":
        return None, "CUDA only"
    try:
        function = PEERS[name](layers, x)
        function()
    except Exception as error:  # a peer's failure is a result, not ours to raise
        return None, first_line(error)
    return function, None


def _lora_layer(layer: Layer, rank: int) -> torch.nn.Module:
    """PEFT's LoRA on a dense linear layer, bf16 throughout."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = torch.nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(layer.dense, requires_grad=False)
    linear.in_features, linear.out_features = layer.dense.shape[1], layer.dense.shape[0]
    model = torch.nn.Sequential(linear)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0"])
    inject_adapter_in_model(config, model)
    return model.to(device=layer.dense.device, dtype=DTYPE)


def _forward_backward(
    call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, dy: torch.Tensor
) -> None:
    call(x.detach().requires_grad_()).backward(dy)


def training_functions(
    layers: list[Layer], x: torch.Tensor, dy: torch.Tensor, rank: int
) -> dict[str, Callable[[], Any]]:
    """Forward and backward of one linear layer: ours folded, dense, and PEFT's LoRA."""
    spec = layers[0].spec
    a = torch.randn(rank, spec.num_groups, device=x.device, requires_grad=True)
    b = torch.zeros(spec.out_features, rank, device=x.device, requires_grad=True)
    low_rank = LowRank(a, b, 0.25)

    def folded(layer: Layer) -> None:
        def call(x: torch.Tensor) -> torch.Tensor:
            return folded_linear(x, layer.packed, None, zeros=low_rank)

        _forward_backward(call, x, dy)

    def dense(layer: Layer) -> None:
        _forward_backward(lambda x: torch.nn.functional.linear(x, layer.dense), x, dy)

    adapted = [_lora_layer(layer, rank) for layer in layers]
    return {
        "qalora": Rotation(folded, layers),
        "dense": Rotation(dense, layers),
        "lora": Rotation(lambda model: _forward_backward(model, x, dy), adapted),
    }


@dataclass
class Work:
    """An operator's variants, and what it has to do."""

    functions: dict[str, Callable[[], Any]]
    moved: int  # bytes read and written, without the weights
    flops: int
    passes: int = 1  # times that the weights are read


def _operators(
    layers: list[Layer], x: torch.Tensor, dy: torch.Tensor, rank: int
) -> dict[str, Work]:
    """Every operator that is measured for this number of rows."""
    spec = layers[0].spec
    k, n, g, m = spec.in_features, spec.out_features, spec.num_groups, x.shape[0]
    item = DTYPE.itemsize
    pooled = ops.pool(x, None, spec.group_size)
    low_rank = LowRank(
        torch.randn(rank, g, device=x.device), torch.randn(n, rank, device=x.device), 0.25
    )

    def on_layers(function: Callable[[Layer], Any]) -> Rotation:
        return Rotation(function, layers)

    linear: dict[str, Callable[[], Any]] = {
        "qalora": on_layers(lambda layer: quantized_linear(x, layer.packed, None)),
        "dense": on_layers(lambda layer: torch.nn.functional.linear(x, layer.dense)),
    }
    io, product = (m * k + m * n) * item, 2 * m * n * k
    table = {"linear": Work(linear, io, product)}
    if m == 1:
        dequantize = on_layers(lambda layer: layer.packed.dequantize(DTYPE))
        table["dequantize"] = Work({"qalora": dequantize}, k * n * item, 0)
        folding = on_layers(lambda layer: layer.packed.fold(low_rank, None))
        table["fold"] = Work({"qalora": folding}, 3 * g * n * 4, 2 * g * n * rank, passes=0)
        return table
    pool: dict[str, Callable[[], Any]] = {"qalora": lambda: ops.pool(x, None, spec.group_size)}
    table["pool"] = Work(pool, m * (k + g) * item, m * k, passes=0)
    grad_input: dict[str, Callable[[], Any]] = {
        "qalora": on_layers(lambda layer: ops.grad_input(dy, layer.packed)),
        "dense": on_layers(lambda layer: dy @ layer.dense),
    }
    table["grad_input"] = Work(grad_input, io, product)
    pooled_grad: dict[str, Callable[[], Any]] = {"qalora": lambda: ops.pooled_grad(dy, pooled)}
    moved = m * (n + g) * item + g * n * 4
    table["pooled_grad"] = Work(pooled_grad, moved, 2 * m * n * g, passes=0)
    group_grad = on_layers(lambda layer: ops.weighted_group_grad(dy, x, layer.packed))
    table["weighted_group_grad"] = Work({"qalora": group_grad}, io + g * n * 4, product)
    return table


def run(
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    rows: list[int],
    rank: int,
    rounds: int,
    device: str,
    limits: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """Measure every operator on layers [K, N] for each M of `rows`.

    Yields:
        Rows as `bench` writes them: one a variant, one a ratio to "qalora", one a missing peer.
    """
    spec = QuantSpec(bits, group_size, *shape)
    layers = rotated_layers(spec, device)
    for m in rows:
        x = torch.randn(m, spec.in_features, device=device, dtype=DTYPE)
        dy = torch.randn(m, spec.out_features, device=device, dtype=DTYPE)
        base = {"K": shape[0], "N": shape[1], "M": m, "bits": bits, "group_size": group_size}
        with torch.no_grad():
            table = _operators(layers, x, dy, rank)
            for name in PEERS:
                function, reason = peer(name, layers, x)
                if function is None:
                    yield {"operator": "linear", "variant": name, **base, "not_run": reason}
                else:
                    table["linear"].functions[name] = function
            measured = {
                operator: interleave(work.functions, rounds, device)
                for operator, work in table.items()
            }
        if m > 1:
            functions = training_functions(layers, x, dy, rank)
            once, operator = table["linear"], f"linear forward+backward, r={rank}"
            table[operator] = Work(functions, 2 * once.moved, 2 * once.flops, passes=2)
            measured[operator] = interleave(functions, rounds, device)
        for operator, times in measured.items():
            for variant, samples in times.items():
                yield {
                    "operator": operator,
                    "variant": variant,
                    **base,
                    "dtype": str(DTYPE).removeprefix("torch."),
                    "rounds": rounds,
                    **spread(samples, "seconds"),
                    **fractions(variant, table[operator], layers[0], median(samples), limits),
                }
            for variant in times:
                if variant != "qalora":
                    pair = f"qalora / {variant}"
                    numbers = ratio(times["qalora"], times[variant])
                    yield {"operator": operator, "ratio": pair, **base, **numbers}


def fractions(
    variant: str, work: Work, layer: Layer, seconds: float, limits: dict[str, float]
) -> dict[str, float]:
    """Bytes moved, and the fractions of the copy bandwidth and of the matrix-product rate."""
    dense = variant in ("dense", "lora")
    weights = layer.dense.numel() * DTYPE.itemsize if dense else layer.packed_bytes
    moved = work.moved + work.passes * weights
    return {
        "bytes_moved": moved,
        "copy_fraction": round(moved / seconds / limits["copy_bytes_per_s"], 3),
        "gemm_fraction": round(work.flops / seconds / limits["gemm_flop_per_s"], 3),
    }
