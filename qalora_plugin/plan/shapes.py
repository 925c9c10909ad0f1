"""The models that are compared, built from config.json on the meta device: shapes, no numbers."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..architecture.selection import check_group_sizes, linears_to_quantize
from ..checkpoint.config import QUANT_METHOD, QALoRAQuantConfig
from ..checkpoint.format import foreign_config
from ..errors import CheckpointError, ConfigError
from ..files.json import read_json
from ..files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from ..layers.linear import QuantLinear
from ..tuner.config import QALoRAConfig
from .settings import PlanSettings

NF4_BLOCK = 64
"""Weights that share a scale (arXiv 2305.14314, section 3)."""
NF4_NESTED_BLOCK = 256
"""Scales, 8 bits each, that share an fp32 scale: double quantization."""


@dataclass(frozen=True)
class ModelShape:
    """An architecture and how its base is quantized.

    Args:
        config: of transformers, without its `quantization_config`.
        base: the grid of the INT-n base.
        quantized: whether the model has this grid already.
    """

    config: Any
    base: QALoRAQuantConfig
    quantized: bool = False

    @property
    def max_tokens(self) -> int | None:
        """Tokens that the model takes, None where its config does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def load_shape(
    name_or_path: str,
    settings: PlanSettings,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """Read config.json of a directory or Hub repository; nothing else is read or downloaded.

    Raises:
        CheckpointError: there is no such directory or repository, or no config.json in it.
        ConfigError: an architecture that transformers does not know, a base quantized by another
            method, or `bits` and `group_size` that differ from those of a quantized base.
    """
    directory = Path(name_or_path)
    if directory.is_dir() and not (directory / CONFIG_FILE).exists():
        raise CheckpointError(_no_config(directory))
    try:
        config = transformers.AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise CheckpointError(
            f"{name_or_path}: expected a directory with config.json or a Hub id, found neither: "
            f"{str(error).splitlines()[0]} Check the name, or log in with `hf auth login` if the "
            "repository is private"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{name_or_path}: {str(error).splitlines()[0]}") from error
    stored = getattr(config, "quantization_config", None)
    base = _base_grid(stored, settings, str(name_or_path))
    if stored is not None:
        del config.quantization_config
    return ModelShape(config, base, quantized=stored is not None)


def _no_config(directory: Path) -> str:
    start = f"{directory}: expected a {CONFIG_FILE}, found none"
    if not (directory / ADAPTER_CONFIG_FILE).exists():
        return f"{start}. Give the directory of a model, or a Hub id"
    base = read_json(directory / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    named = f", {base}" if base else ""
    return f"{start}: it is an adapter. Give the model that it was trained on{named}"


def _base_grid(stored: Any, settings: PlanSettings, where: str) -> QALoRAQuantConfig:
    if stored is None:
        return QALoRAQuantConfig(
            bits=4 if settings.bits is None else settings.bits,
            group_size=32 if settings.group_size is None else settings.group_size,
        )
    if stored.get("quant_method") == QUANT_METHOD:
        base = QALoRAQuantConfig(**stored)
    else:
        foreign = foreign_config(stored, Path(where, CONFIG_FILE))
        if foreign is None:
            raise ConfigError(
                f"{where}: is quantized with {stored.get('quant_method')!r}; expected a 16-bit "
                "model, or one that qalora quantize, AutoGPTQ or GPTQModel wrote. Give the 16-bit "
                "model"
            )
        base = foreign
    for key in ("bits", "group_size"):
        wanted, found = getattr(settings, key), getattr(base, key)
        if wanted not in (None, found):
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{where}: is quantized with {key}={found}, {option} asks for {wanted}. Leave "
                f"{option} out, or give the 16-bit model"
            )
    return base


class _NF4Product(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit as far as memory goes: keeps the packed weight, not x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "NF4Linear") -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return dy @ ctx.layer.dense(dy.dtype), None


class NF4Linear(nn.Linear):
    """The tensors of a bitsandbytes `Linear4bit` (NF4, double quantization), without its numbers.

    A subclass of nn.Linear, so that PEFT's LoRA takes it.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.bias = linear.bias
        n = linear.weight.numel()
        scales = -(-n // NF4_BLOCK)
        self.weight = nn.Parameter(
            torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False
        )
        self.register_buffer("absmax", torch.empty(scales, dtype=torch.uint8, device="meta"))
        nested = torch.empty(-(-scales // NF4_NESTED_BLOCK), dtype=torch.float32, device="meta")
        self.register_buffer("nested_absmax", nested)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the size of the dequantized weight [N, K]."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., K] -> [..., N]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = cast(torch.Tensor, _NF4Product.apply(x, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _empty_model(shape: ModelShape, settings: PlanSettings) -> transformers.PreTrainedModel:
    config = shape.config
    names = getattr(config, "architectures", None) or [None]
    model_class = getattr(transformers, str(names[0]), transformers.AutoModelForCausalLM)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    with torch.device("meta"):
        model = build(config, dtype=settings.torch_dtype, attn_implementation="sdpa")
    model.requires_grad_(False)
    return model


def quantized_model(shape: ModelShape, settings: PlanSettings) -> PeftModel:
    """The base in INT-n with a QA-LoRA adapter, on the meta device.

    Raises:
        ConfigError: nothing to quantize, or `group_size` or `target_modules` does not fit.
    """
    model = _empty_model(shape, settings)
    linears = linears_to_quantize(model, shape.base.modules_to_not_convert)
    if not shape.quantized:
        check_group_sizes(shape.base.group_sizes, linears.values())
    for name, linear in linears.items():
        spec = shape.base.spec_for(name, linear.in_features, linear.out_features)
        layer = QuantLinear(spec, desc_act=shape.base.desc_act, device="meta")
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    targets = None if settings.target_modules is None else list(settings.target_modules)
    with torch.device("meta"):
        config = QALoRAConfig(r=settings.r, adapt=settings.adapt, target_modules=targets)
        return get_peft_model(model, config)


def lora_model(shape: ModelShape, settings: PlanSettings) -> PeftModel:
    """The 16-bit base with PEFT's LoRA on the same layers, on the meta device."""
    model = _empty_model(shape, settings)
    targets = list(
        settings.target_modules or linears_to_quantize(model, shape.base.modules_to_not_convert)
    )
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=settings.r, target_modules=targets))


def qlora_model(shape: ModelShape, settings: PlanSettings) -> PeftModel:
    """The base in NF4 with PEFT's LoRA on the same layers, on the meta device."""
    model = _empty_model(shape, settings)
    linears = linears_to_quantize(model, shape.base.modules_to_not_convert)
    targets = list(settings.target_modules or linears)
    for name, linear in linears.items():
        model.set_submodule(name, NF4Linear(linear))
    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=settings.r, target_modules=targets))


METHODS: dict[str, Callable[[ModelShape, PlanSettings], PeftModel]] = {
    "qalora": quantized_model,
    "lora": lora_model,
    "qlora": qlora_model,
}


@dataclass(frozen=True)
class TensorShape:
    """One parameter or buffer of a model.

    Args:
        part: "linear_weights", "scales_offsets", "rest" or "adapters".
        numel: elements.
        itemsize: bytes of one.
        sharded: bytes of one element where ZeRO-3 partitions it: parameters, and what
            `quant.sharded.ShardedQuantLinear` makes one; 0 for other buffers, which stay whole.
        stored: bytes of one element in a checkpoint; 0 where it is not stored.
    """

    part: str
    numel: int
    itemsize: int
    sharded: int
    stored: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.numel * self.itemsize


_PARTS = {
    "qweight": "linear_weights",
    "scales": "scales_offsets",
    "offsets": "scales_offsets",
    "g_idx": "scales_offsets",
    "absmax": "scales_offsets",
    "nested_absmax": "scales_offsets",
}


def tensor_shapes(model: PeftModel) -> list[TensorShape]:
    """Every parameter and buffer of a model, tied ones once, in the order of execution."""
    found: dict[int, TensorShape] = {}
    linears = set(linears_of_blocks(model))
    for module_name, module in model.named_modules():
        tensors = itertools.chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        )
        for name, tensor in tensors:
            if id(tensor) in found:
                continue
            sharded = tensor.element_size() if isinstance(tensor, nn.Parameter) else 0
            part = _PARTS.get(name, "rest")
            if tensor.requires_grad:
                part = "adapters"
            elif name == "weight" and module_name in linears:
                part = "linear_weights"
            stored = tensor.element_size()
            if name in module._non_persistent_buffers_set:
                stored = 0
            elif isinstance(module, QuantLinear) and name in ("scales", "offsets"):
                spec = module.spec
                stored = (spec.scales_dtype if name == "scales" else spec.stored_dtype).itemsize
                sharded = torch.promote_types(spec.scales_dtype, spec.stored_dtype).itemsize
            elif isinstance(module, QuantLinear) and name == "g_idx":
                sharded = tensor.element_size()
            found[id(tensor)] = TensorShape(
                part, tensor.numel(), tensor.element_size(), sharded, stored
            )
    return list(found.values())


def linears_of_blocks(model: PeftModel) -> list[str]:
    """Names of the layers that QA-LoRA quantizes, whatever they are in this model."""
    base = model.get_base_model()
    head = base.get_output_embeddings()
    blocks = tuple(n + "." for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and name.startswith(blocks)
        and not module.weight.requires_grad
    ]
