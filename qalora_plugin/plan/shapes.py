"""The models that a plan compares, built from config.json on the meta device, without numbers."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qalora_kernels.stored import QUANT_METHOD

from ..architecture.experts import Experts, find_experts
from ..architecture.model import check_sizes
from ..architecture.selection import check_group_sizes, linears_in_blocks, linears_to_quantize
from ..architecture.unfuse import unfuse_all
from ..checkpoint.checkpoint import open_headers, open_quantized
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import foreign_config
from ..checkpoint.kind import find_kind
from ..errors import CheckpointError, ConfigError
from ..files.json import read_json
from ..files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from ..files.schemas import ConfigFile, read_as
from ..layers.linear import QuantLinear
from ..quantize.calibration import longest_row
from ..tuner.config import QALoRAConfig
from .settings import PlanSettings

NF4_BLOCK = 64  # weights that share a scale (arXiv 2305.14314, section 3)
NF4_NESTED_BLOCK = 256  # 8-bit scales that share an fp32 scale (double quantization)


@dataclass(frozen=True)
class ModelShape:
    """An architecture, and how its base is quantized.

    Args:
        config: the transformers config, without `quantization_config`.
        base: the grid of the INT-n base.
        quantized: whether the model is quantized on this grid already.
    """

    config: Any
    base: QALoRAQuantConfig
    quantized: bool = False

    @property
    def max_tokens(self) -> int | None:
        """Return the longest row that the model takes in tokens, None if its config names none."""
        return longest_row(self.config)


def load_shape(
    name_or_path: str,
    settings: PlanSettings,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """Read config.json of a directory or Hub repository; of weights beside it the headers at most.

    Args:
        name_or_path: a directory with config.json, or a Hub id.
        settings: whose `bits` and `group_size` choose the grid of a 16-bit model.
        revision: branch, tag or commit of the Hub repository.
        trust_remote_code: whether Python code that the model brings may run.

    Raises:
        CheckpointError: there is no such directory or repository, or no config.json in it, or one
            that contradicts the tensors beside it.
        ConfigError: transformers does not know the architecture, another method quantized the
            base, or `bits` or `group_size` differ from those of a quantized base.
    """
    if find_kind(name_or_path).base is not None and Path(name_or_path).is_file():
        return _shape_of_file(Path(name_or_path), settings)
    directory = Path(name_or_path)
    if directory.is_dir() and not (directory / CONFIG_FILE).exists():
        raise CheckpointError(_no_config(directory))
    if directory.is_dir():
        path = directory / CONFIG_FILE
        raw = read_as(path, ConfigFile)
        check_sizes(raw, path)
        method = (raw.get("quantization_config") or {}).get("quant_method")
        if method == QUANT_METHOD and any(directory.glob("*.safetensors")):
            check_sizes(raw, path, len(open_headers(directory).weight_names))
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
    except Exception as error:  # of transformers' code, which trusts a config
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{name_or_path}: {what}") from error
    stored = getattr(config, "quantization_config", None)
    base = _base_grid(stored, settings, str(name_or_path))
    if stored is not None:
        del config.quantization_config
    return ModelShape(config, base, quantized=stored is not None)


def _shape_of_file(path: Path, settings: PlanSettings) -> ModelShape:
    """Read a base that is one file; its layers may have other bits than most."""
    checkpoint = open_quantized(path)
    _check_grid(checkpoint.config, settings, str(path))
    raw = dict(checkpoint.reader.config)
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    return ModelShape(config, checkpoint.config, quantized=True)


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
                "model, or one in a format that can be a base. Give the 16-bit model"
            )
        base = foreign
    _check_grid(base, settings, where)
    return base


def _check_grid(base: QALoRAQuantConfig, settings: PlanSettings, where: str) -> None:
    """Refuse another grid than that of a quantized base."""
    for key in ("bits", "group_size"):
        wanted, found = getattr(settings, key), getattr(base, key)
        if wanted not in (None, found):
            option = f"--{key.replace('_', '-')}"
            raise ConfigError(
                f"{where}: is quantized with {key}={found}, {option} asks for {wanted}. Leave "
                f"{option} out, or give the 16-bit model"
            )


class _NF4Product(torch.autograd.Function):
    """The memory of bitsandbytes' MatMul4Bit: its backward keeps the packed weight, not x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "NF4Linear") -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.dense(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return dy @ ctx.layer.dense(dy.dtype), None


class NF4Linear(nn.Linear):
    """The tensors of a bitsandbytes `Linear4bit` (NF4, double quantization), without numbers.

    It is a subclass of nn.Linear, so that PEFT's LoRA takes it.
    """

    absmax: torch.Tensor
    nested_absmax: torch.Tensor

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

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the weight, its scales and their scales."""
        return self.weight.nbytes + self.absmax.nbytes + self.nested_absmax.nbytes

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return an empty tensor in place of the dequantized weight [N, K]."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y [..., N] for x [..., K]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = cast(torch.Tensor, _NF4Product.apply(x, self))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _empty_model(shape: ModelShape, settings: PlanSettings) -> transformers.PreTrainedModel:
    """Build the dense model on the meta device, frozen, with sdpa attention where it has that."""
    names = getattr(shape.config, "architectures", None) or [None]
    model_class = getattr(transformers, str(names[0]), transformers.AutoModelForCausalLM)
    build = getattr(model_class, "_from_config", None) or model_class.from_config
    attention = "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"
    with torch.device("meta"):
        model = build(shape.config, dtype=settings.torch_dtype, attn_implementation=attention)
        unfuse_all(model)
    for name, experts in find_experts(model).items():
        model.set_submodule(name, OneExpert(experts))
    return model.requires_grad_(False)


class OneExpert(Experts):
    """Stands for a mixture's experts, of which it has one, `num_experts` times.

    All tokens that are routed go through it: which expert takes how many changes no sum of bytes.
    """

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        self.add_module("0", experts.experts[0])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute tensors of the shapes that `Experts` computes."""
        rows = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
        outputs = self.experts[0](rows).view(*top_k_index.shape, -1)
        return (outputs * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def repeats(model: nn.Module) -> dict[str, int]:
    """Return how often each module of a model that stands for experts is there, others once."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        owner = name.rpartition(".")[0]
        counts[name] = counts.get(owner, 1)
        if isinstance(module, OneExpert):
            counts[name] = module.num_experts
    return counts


def count_parameters(shape: ModelShape, settings: PlanSettings) -> tuple[int, int]:
    """Return the parameters of the dense model, and those among them that a token is sent through.

    The two differ by the experts of a mixture that the router does not choose.
    """
    model, chosen = _empty_model(shape, settings), 0
    text = shape.config.get_text_config()
    counts, seen, total = repeats(model), set(), 0
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel() * counts[name]
            is_expert = counts[name] > 1
            chosen += parameter.numel() * (text.num_experts_per_tok if is_expert else 1)
    return total, chosen


def _int_layer(name: str, linear: nn.Linear, base: QALoRAQuantConfig) -> QuantLinear:
    spec = base.spec_for(name, linear.in_features, linear.out_features)
    layer = QuantLinear(spec, desc_act=base.desc_act, device="meta")
    layer.bias = linear.bias
    return layer


METHODS: dict[str, Callable[[str, nn.Linear, QALoRAQuantConfig], nn.Module]] = {
    "qalora": _int_layer,
    "lora": lambda name, linear, base: linear,
    "qlora": lambda name, linear, base: NF4Linear(linear),
}
"""The layer of each method's base, made from a layer's name, the dense layer and the grid."""


def build_model(method: str, shape: ModelShape, settings: PlanSettings) -> PeftModel:
    """Build the base and the adapters of one method, a key of `METHODS`, on the meta device.

    Raises:
        ConfigError: there is nothing to quantize, or `group_size` or `target_modules` does not fit.
    """
    model = _empty_model(shape, settings)
    base = shape.base
    linears = linears_to_quantize(model, base.modules_to_not_convert, asked=base.dynamic)
    for name, linear in linears.items():
        model.set_submodule(name, METHODS[method](name, linear, shape.base))
    targets = settings.target_modules
    if method == "qalora":
        if not shape.quantized:
            check_group_sizes(shape.base.group_sizes, linears.values())
        chosen = None if targets is None else list(targets)
        config = QALoRAConfig(r=settings.r, adapt=settings.adapt, target_modules=chosen)
    else:
        config = LoraConfig(r=settings.r, target_modules=list(targets or linears))
    # PEFT would look for the experts as transformers fuses them
    unchanged = patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers")
    with torch.device("meta"), unchanged:
        return get_peft_model(model, config)


@dataclass(frozen=True)
class TensorShape:
    """The sizes of one parameter or buffer of a model.

    Args:
        part: "linear_weights", "scales_offsets", "rest" or "adapters".
        numel: number of elements.
        itemsize: bytes of one element in memory.
        sharded: bytes of one element where ZeRO-3 partitions it: parameters, and the tensors that
            `ShardedQuantLinear` makes parameters; 0 for other buffers, which stay whole.
        stored: bytes of one element in a checkpoint; 0 where it is not stored.
    """

    part: str
    numel: int
    itemsize: int
    sharded: int
    stored: int

    @property
    def nbytes(self) -> int:
        """Return the tensor's bytes in memory."""
        return self.numel * self.itemsize


_GRID = {"scales", "offsets", "g_idx", "absmax", "nested_absmax"}


def tensor_shapes(model: PeftModel) -> list[TensorShape]:
    """List every parameter and buffer of a model, tied ones once, in the order of execution."""
    found: dict[int, list[TensorShape]] = {}
    linears, counts = set(linears_in_blocks(model.get_base_model()).values()), repeats(model)
    for place, module in model.named_modules():
        is_linear = module in linears or isinstance(module, NF4Linear)
        for name, tensor in itertools.chain(
            module.named_parameters(recurse=False), module.named_buffers(recurse=False)
        ):
            if id(tensor) in found:
                continue
            part = "rest"
            if tensor.requires_grad:
                part = "adapters"
            elif name in _GRID:
                part = "scales_offsets"
            elif name == "qweight" or (name == "weight" and is_linear):
                part = "linear_weights"
            sizes = TensorShape(part, tensor.numel(), *_itemsizes(module, name, tensor))
            found[id(tensor)] = [sizes] * counts[place]
    return list(itertools.chain.from_iterable(found.values()))


def _itemsizes(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return `itemsize`, `sharded` and `stored` of a `TensorShape`."""
    itemsize = tensor.element_size()
    if isinstance(module, QuantLinear) and name in ("scales", "offsets"):
        scales, offsets = module.spec.scales_dtype, module.spec.stored_dtype
        stored = scales if name == "scales" else offsets
        # ZeRO-3 shards both as one parameter, in the wider dtype
        return itemsize, torch.promote_types(scales, offsets).itemsize, stored.itemsize
    is_g_idx = isinstance(module, QuantLinear) and name == "g_idx"
    is_sharded = is_g_idx or isinstance(tensor, nn.Parameter)
    is_stored = name not in module._non_persistent_buffers_set
    return itemsize, itemsize * is_sharded, itemsize * is_stored
