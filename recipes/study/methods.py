"""The models that the comparison trains: each method's, with its parameter groups."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, parameter_groups, quantize_model
from qalora_plugin.optimizer import SCALE_LR_RATIO
from qalora_plugin.quant.linear import QuantLinear
from qalora_plugin.quickstart.data import base_model_path
from qalora_plugin.tuner.layer import QALoRALinear


@dataclass(frozen=True)
class Settings:
    """What is the same in all methods."""

    rank: int = 8
    alpha: float = 16
    group_size: int = 32
    scale_lr_ratio: float = SCALE_LR_RATIO


def load(directory: Path) -> nn.Module:
    """A model in fp32 arithmetic, as every model here."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def sixteen_bit_model() -> nn.Module:
    """The embedded base."""
    return load(base_model_path())


def _quantize(
    model: Path | nn.Module, out: Path, bits: int, group_size: int, calibration: torch.Tensor
) -> None:
    """Our GPTQ with its defaults; int64 [samples, length] calibration tokens."""
    quantize_model(
        model,
        out,
        bits=bits,
        group_size=group_size,
        calibration=calibration,
        samples=len(calibration),
        seq_len=calibration.shape[1],
        progress=False,
    )


def quantized_base(folder: Path, bits: int, group_size: int, calibration: torch.Tensor) -> Path:
    """Directory of the base under our GPTQ, made on first use."""
    out = folder / f"base-{bits}bit-g{group_size}"
    if not out.is_dir():
        _quantize(base_model_path(), out, bits, group_size, calibration)
    return out


def requantized(
    model: nn.Module, bits: int, group_size: int, calibration: torch.Tensor
) -> nn.Module:
    """A merged 16-bit model under our GPTQ."""
    with tempfile.TemporaryDirectory() as folder:
        _quantize(model, Path(folder) / "merged", bits, group_size, calibration)
        return load(Path(folder) / "merged")


def lora(settings: Settings, seed: int) -> PeftModel:
    """PEFT's LoRA on every linear layer in the blocks of the 16-bit base."""
    torch.manual_seed(seed)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear")
    return get_peft_model(sixteen_bit_model(), config)


def adapted(base: Path, method: str, settings: Settings, seed: int) -> PeftModel:
    """This package's adapter in the mode `method`, or PEQA's, on a quantized base."""
    model = load(base)
    if method == "peqa":
        return peqa(model, seed)
    config = QALoRAConfig(r=settings.rank, lora_alpha=settings.alpha, adapt=method, seed=seed)
    return get_peft_model(model, config)


def peqa(model: nn.Module, seed: int) -> PeftModel:
    """PEQA (arXiv 2305.14152): every scale is trained, integers and zero-points stay.

    It is our change of the scales with A the identity: s' = s * (1 + B^T), B [N, G] free.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    ranks = {name: layer.spec.num_groups for name, layer in layers.items()}
    config = QALoRAConfig(adapt="scales", rank_pattern=ranks, alpha_pattern=ranks, seed=seed)
    model = get_peft_model(model, config)
    for layer in scale_layers(model):
        nn.init.eye_(layer.qalora_scale_A["default"].weight).requires_grad_(False)
    return model


def scale_layers(model: nn.Module) -> list[QALoRALinear]:
    """Layers whose scales are trained."""
    return [m for m in model.modules() if isinstance(m, QALoRALinear) and m.qalora_scale_A]


def groups(model: nn.Module, lr: float, settings: Settings) -> list[dict[str, Any]]:
    """The package's parameter groups, for every method."""
    return parameter_groups(model, lr, scale_lr_ratio=settings.scale_lr_ratio)
