"""From shapes to bytes: memory of one GPU by part, host memory, and sizes on disk."""

from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.layout import GUARD_DTYPE
from ..layers.linear import QuantLinear
from .settings import PlanSettings
from .shapes import METHODS, ModelShape, NF4Linear, TensorShape, tensor_shapes
from .simulate import simulate

USUAL_GPU_MEMORY = (16, 24, 40, 48, 80, 141)
"""GiB."""
USABLE = 0.95
"""Of a GPU's memory: the driver keeps some, and the allocator cannot use every gap."""

PARTS = (
    "linear_weights",
    "scales_offsets",
    "rest",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "allocator",
    "communication",
    "runtime",
)

ZERO2_BUCKET = 500_000_000
"""Elements of each of ZeRO-2's two reduction buffers, DeepSpeed's default `reduce_bucket_size`."""
ZERO3_REUSE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a gathered parameter, its `stage3_max_reuse_distance`."""
ZERO3_PERSISTENT = 10
"""Times hidden_size: smaller parameters stay whole (`stage3_param_persistence_threshold` auto)."""
ZERO3_PREFETCH = 0.9
"""Times hidden_size squared: elements gathered ahead (`stage3_prefetch_bucket_size` auto)."""

CUDA_RUNTIME = 600 << 20
"""CUDA context with its kernels, and cuBLAS's workspace: assumed, not measured here."""
CPU_RUNTIME = 40 << 20
"""Resident code and pools of the libraries (MKL, oneDNN, autograd) that the first step loads; on a
GPU machine they are in host memory. Measured by integration/plan/measure.py as what a Llama
and a Qwen2 took above their tensors, 32 to 57 MB, with malloc set to keep no freed blocks."""


@dataclass(frozen=True)
class MethodPlan:
    """What one method needs.

    Args:
        memory: bytes on one GPU by part (`PARTS`).
        host: bytes of host memory for each GPU, from offloading.
        disk: bytes of "base", "adapter" and "merged".
    """

    memory: dict[str, int]
    host: int
    disk: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes on one GPU."""
        return sum(self.memory.values())

    def fits(self, gibibytes: float) -> bool:
        """Whether a GPU with so much memory can hold it."""
        return self.total <= USABLE * gibibytes * 2**30

    def as_json(self, sizes: tuple[float, ...]) -> dict[str, Any]:
        """Plain values; `fits` by GiB."""
        fits = {f"{size:g}": self.fits(size) for size in sizes}
        return {**asdict(self), "total": self.total, "fits": fits}


def plan(shape: ModelShape, settings: PlanSettings) -> dict[str, MethodPlan]:
    """Plan a training run by QA-LoRA, LoRA and QLoRA.

    Returns:
        {"qalora": ..., "lora": ..., "qlora": ...}

    Raises:
        ConfigError: see `shapes` and `simulate`.
    """
    return {method: plan_method(method, shape, settings) for method in METHODS}


def plan_method(method: str, shape: ModelShape, settings: PlanSettings) -> MethodPlan:
    """Plan one method, a key of `METHODS`; see `plan`."""
    model = METHODS[method](shape, settings)
    tensors = tensor_shapes(model)
    guards = sum(isinstance(module, QuantLinear) for module in model.modules())
    nf4 = [module for module in model.modules() if isinstance(module, NF4Linear)]
    dense = sum(layer.in_features * layer.out_features for layer in nf4)
    hidden = shape.config.get_text_config().hidden_size
    step = simulate(model, settings)
    memory = dict.fromkeys(PARTS, 0)
    host = _static(memory, tensors, hidden, settings)
    memory["activations"] = step.activations
    memory["workspace"] = step.workspace
    memory["allocator"] = step.freed
    memory["communication"] = _communication(tensors, hidden, settings)
    memory["runtime"] = CUDA_RUNTIME if settings.device == "cuda" else CPU_RUNTIME
    return MethodPlan(memory, host, _disk(method, tensors, guards, dense, settings))


def _static(
    memory: dict[str, int], tensors: list[TensorShape], hidden: int, settings: PlanSettings
) -> int:
    """Fill in weights, gradients and optimizer; returns the bytes in host memory."""
    host = 0
    gpus, zero = settings.gpus, settings.zero
    for tensor in tensors:
        trained = tensor.part == "adapters"
        # DeepSpeed casts what is trained to its own dtype, and keeps an fp32 copy
        itemsize = settings.torch_dtype.itemsize if trained and zero else tensor.itemsize
        share = tensor.numel
        if zero == 3 and tensor.sharded and not trained:
            itemsize = tensor.sharded
        if zero == 3 and tensor.sharded and tensor.numel > ZERO3_PERSISTENT * hidden:
            share = -(-tensor.numel // gpus)
            if settings.offload == "all":
                host += share * itemsize
                share = 0
        memory[tensor.part] += share * itemsize
        if not trained:
            continue
        own = -(-tensor.numel // gpus) if zero else tensor.numel
        states = own * (4 if zero else 0) + _optimizer_bytes(settings.optimizer, own)
        if settings.offload == "none":
            memory["optimizer"] += states
            memory["gradients"] += own * itemsize
        else:
            host += states + own * 4  # the CPU's optimizer takes fp32 gradients
    return host


def _optimizer_bytes(optimizer: str, numel: int) -> int:
    """States of a tensor of `numel` elements.

    bitsandbytes' 8-bit Adam has an fp32 scale for 256 values, and leaves tensors below 4096
    elements in 32 bits.
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw" or numel < 4096:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // 256))


def _communication(tensors: list[TensorShape], hidden: int, settings: PlanSettings) -> int:
    """Buffers that gradients are reduced through, and parameters that ZeRO-3 has gathered."""
    itemsize = settings.torch_dtype.itemsize
    trained = [tensor for tensor in tensors if tensor.part == "adapters"]
    if settings.zero == 0:
        return sum(t.nbytes for t in trained) if settings.gpus > 1 else 0  # DDP's buckets
    if settings.zero == 2:
        return 2 * ZERO2_BUCKET * itemsize
    gathered = [t for t in tensors if t.sharded and t.numel > ZERO3_PERSISTENT * hidden]
    kept = kept_bytes = 0
    # a parameter that is used `d` elements before the forward ends is used again 2 d later
    for tensor in reversed(gathered):
        if kept >= ZERO3_REUSE // 2:
            break
        kept += tensor.numel
        kept_bytes += tensor.numel * tensor.sharded
    largest = max((tensor.numel * tensor.sharded for tensor in gathered), default=0)
    widest = max((tensor.sharded for tensor in gathered), default=0)
    everything = sum(tensor.numel * tensor.sharded for tensor in gathered)
    prefetched = int(ZERO3_PREFETCH * hidden**2) * widest
    reduction = hidden**2 * itemsize
    return min(everything, max(kept_bytes, largest) + prefetched) + reduction


def _disk(
    method: str, tensors: list[TensorShape], guards: int, dense: int, settings: PlanSettings
) -> dict[str, int]:
    """Bytes of tensors in a checkpoint; headers and tokenizer come on top.

    Merging QLoRA gives `dense` weights of 16 bits where the base had NF4.
    """
    adapter = sum(t.nbytes for t in tensors if t.part == "adapters")
    base = sum(t.numel * t.stored for t in tensors if t.part != "adapters")
    base += guards * GUARD_DTYPE.itemsize
    merged = base
    if method == "qlora":
        rest = sum(t.numel * t.stored for t in tensors if t.part == "rest")
        merged = dense * settings.torch_dtype.itemsize + rest
    return {"base": base, "adapter": adapter, "merged": merged}
