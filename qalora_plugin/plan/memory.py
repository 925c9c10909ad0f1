"""Bytes of a training run: memory of one GPU by part, host memory, and sizes on disk."""

from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel

from qalora_kernels.stored import GUARD_BYTES

from ..errors import ConfigError, QALoRAError
from ..files.names import CONFIG_FILE
from ..layers.linear import QuantLinear
from .settings import PlanSettings
from .shapes import (
    METHODS,
    ModelShape,
    NF4Linear,
    TensorShape,
    build_model,
    repeats,
    tensor_shapes,
)
from .simulate import simulate

USUAL_GPU_MEMORY = (16, 24, 40, 48, 80, 141)  # GiB
USABLE = 0.95
"""Share of a GPU's memory: the driver keeps some, and the allocator cannot use every gap."""

PARTS = (
    "linear_weights",
    "scales_offsets",
    "rest",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "workspace",
    "communication",
    "runtime",
)
"""The parts of the memory, in the order of the table."""

ZERO2_BUCKET = 500_000_000
"""Elements of each of ZeRO-2's two reduction buffers, DeepSpeed's default `reduce_bucket_size`."""
ZERO3_REUSE = 1_000_000_000
"""Elements within which ZeRO-3 keeps a gathered parameter (`stage3_max_reuse_distance`)."""
ZERO3_PERSISTENT = 10
"""Times hidden_size: ZeRO-3 leaves smaller ones whole (`stage3_param_persistence_threshold`)."""
ZERO3_PREFETCH = 0.9
"""Times hidden_size squared: elements gathered ahead (`stage3_prefetch_bucket_size`)."""

CUDA_RUNTIME = 600 << 20
"""Bytes of the CUDA context, its kernels and cuBLAS's workspace: assumed, not measured here."""


@dataclass(frozen=True)
class MethodPlan:
    """The memory and disk space that one method needs.

    The parts are bytes of tensors as torch allocates them. A process holds more: its libraries,
    and freed blocks that the allocator keeps.

    Args:
        memory: bytes on one GPU (or in one process on the CPU) by part, see `PARTS`.
        host: bytes of host memory for each GPU, from offloading.
        disk: bytes of "base", "adapter" and "merged".
    """

    memory: dict[str, int]
    host: int
    disk: dict[str, int]

    @property
    def total(self) -> int:
        """Return the bytes on one GPU."""
        return sum(self.memory.values())

    def fits(self, gibibytes: float) -> bool:
        """Return whether a GPU with so much memory can hold it."""
        return self.total <= USABLE * gibibytes * 2**30

    def as_json(self, sizes: tuple[float, ...]) -> dict[str, Any]:
        """Return plain values; `fits` has an entry for each of `sizes`, in GiB."""
        fits = {f"{size:g}": self.fits(size) for size in sizes}
        return {**asdict(self), "total": self.total, "fits": fits}


def plan(shape: ModelShape, settings: PlanSettings) -> dict[str, MethodPlan]:
    """Plan a training run by QA-LoRA, LoRA and QLoRA.

    Returns:
        {"qalora": ..., "lora": ..., "qlora": ...}

    Raises:
        ConfigError: see `shapes.build_model` and `simulate.simulate`; or the sizes in config.json
            contradict each other.
    """
    try:
        return {method: plan_method(method, shape, settings) for method in METHODS}
    except QALoRAError:
        raise
    except Exception as error:  # of transformers' code, which trusts a config
        what = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{CONFIG_FILE}: a model of these sizes cannot run a step ({type(error).__name__}: "
            f"{what:.200}). Restore the original file"
        ) from error


def plan_method(method: str, shape: ModelShape, settings: PlanSettings) -> MethodPlan:
    """Plan one method, a key of `METHODS`; see `plan`."""
    model = build_model(method, shape, settings)
    tensors = tensor_shapes(model)
    disk = _disk(model, tensors, settings)
    hidden = shape.config.get_text_config().hidden_size
    memory, host = _static(tensors, hidden, settings)
    memory["communication"] = _communication(tensors, hidden, settings)
    memory["runtime"] = CUDA_RUNTIME if settings.device == "cuda" else 0
    step = simulate(model, settings)
    memory["activations"], memory["workspace"] = step.activations, step.workspace
    return MethodPlan(memory, host, disk)


def _static(
    tensors: list[TensorShape], hidden: int, settings: PlanSettings
) -> tuple[dict[str, int], int]:
    """Return the bytes of weights, gradients and optimizer states by part, and the host's bytes."""
    memory, host = dict.fromkeys(PARTS, 0), 0
    for tensor in tensors:
        held, offloaded = _weight_bytes(tensor, hidden, settings)
        memory[tensor.part] += held
        host += offloaded
        gradients, states = _training_bytes(tensor, settings)
        if settings.offload == "none":
            memory["gradients"] += gradients
            memory["optimizer"] += states
        else:
            host += gradients + states
    return memory, host


def _weight_bytes(tensor: TensorShape, hidden: int, settings: PlanSettings) -> tuple[int, int]:
    """Return the bytes of a tensor on one GPU, and its bytes in host memory for each GPU."""
    itemsize = tensor.itemsize
    if settings.zero and tensor.part == "adapters":
        itemsize = settings.torch_dtype.itemsize  # DeepSpeed casts what is trained
    elif settings.zero == 3 and tensor.sharded:
        itemsize = tensor.sharded
    if settings.zero < 3 or not _is_partitioned(tensor, hidden):
        return tensor.numel * itemsize, 0
    share = -(-tensor.numel // settings.gpus) * itemsize
    return (0, share) if settings.offload == "all" else (share, 0)


def _training_bytes(tensor: TensorShape, settings: PlanSettings) -> tuple[int, int]:
    """Return the bytes of a tensor's gradients and optimizer states in one process."""
    if tensor.part != "adapters":
        return 0, 0
    if not settings.zero:
        return tensor.nbytes, _optimizer_bytes(settings.optimizer, tensor.numel)
    own = -(-tensor.numel // settings.gpus)
    # DeepSpeed's optimizer holds an fp32 copy, and takes fp32 gradients on the CPU
    itemsize = 4 if settings.offload != "none" else settings.torch_dtype.itemsize
    return itemsize * own, 4 * own + _optimizer_bytes(settings.optimizer, own)


def _is_partitioned(tensor: TensorShape, hidden: int) -> bool:
    """Return whether ZeRO-3 partitions a tensor."""
    return bool(tensor.sharded) and tensor.numel > ZERO3_PERSISTENT * hidden


def _optimizer_bytes(optimizer: str, numel: int) -> int:
    """Return the bytes of the states of a tensor of `numel` elements.

    bitsandbytes' 8-bit Adam has an fp32 scale for 256 values, and leaves tensors below 4096
    elements in 32 bits.
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw" or numel < 4096:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // 256))


def _communication(tensors: list[TensorShape], hidden: int, settings: PlanSettings) -> int:
    """Return the bytes of buffers for gradients, and of parameters that ZeRO-3 has gathered."""
    itemsize = settings.torch_dtype.itemsize
    if settings.zero == 0:  # DDP's buckets
        trained = sum(tensor.nbytes for tensor in tensors if tensor.part == "adapters")
        return trained if settings.gpus > 1 else 0
    if settings.zero == 2:
        return 2 * ZERO2_BUCKET * itemsize
    gathered = [tensor for tensor in tensors if _is_partitioned(tensor, hidden)]
    kept = kept_bytes = 0
    # a parameter that is used `d` elements before the forward ends is used again 2 d later
    for tensor in reversed(gathered):
        if kept >= ZERO3_REUSE // 2:
            break
        kept += tensor.numel
        kept_bytes += tensor.numel * tensor.sharded
    sizes = [tensor.numel * tensor.sharded for tensor in gathered]
    itemsizes = [tensor.sharded for tensor in gathered]
    ahead = int(ZERO3_PREFETCH * hidden**2) * max(itemsizes, default=0)
    # and the buffer that gradients are reduced through
    return min(sum(sizes), max([kept_bytes, *sizes]) + ahead) + hidden**2 * itemsize


def _disk(model: PeftModel, tensors: list[TensorShape], settings: PlanSettings) -> dict[str, int]:
    """Return the bytes of the tensors in checkpoints; headers and tokenizers come on top."""
    adapter = sum(tensor.nbytes for tensor in tensors if tensor.part == "adapters")
    base = sum(tensor.numel * tensor.stored for tensor in tensors if tensor.part != "adapters")
    counts, packed, dense = repeats(model), 0, 0
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            base += GUARD_BYTES * counts[name]
        elif isinstance(module, NF4Linear):
            packed += module.packed_bytes * counts[name]
            dense += module.in_features * module.out_features * counts[name]
    # merging QLoRA gives dense weights
    merged = base - packed + dense * settings.torch_dtype.itemsize
    return {"base": base, "adapter": adapter, "merged": merged}
