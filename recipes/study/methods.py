"""The models that the study trains, one a method."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, quantize_model
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.tuner.layer import QALoRALinear
from qalora_plugin.tuner.parameter_groups import SCALE_LR_RATIO

LORAS = ("lora", "lora+gptq")
"""Methods that train PEFT's LoRA on the 16-bit base."""


@dataclass(frozen=True)
class Settings:
    """The settings that all methods share."""

    rank: int = 8
    alpha: float = 16
    group_size: int = 32
    scale_lr_ratio: float = SCALE_LR_RATIO


@dataclass(frozen=True)
class Models:
    """Makes the models of the study, which compute in fp32.

    Args:
        settings: of every method.
        folder: where quantized bases are kept.
        calibration: int64 [samples, length], for GPTQ.
    """

    settings: Settings
    folder: Path
    calibration: torch.Tensor

    def _quantized(self, model: Path | nn.Module, out: Path, bits: int) -> nn.Module:
        """Return a 16-bit model, or that of a directory, under our GPTQ; `out` is made once."""
        if not out.is_dir():
            quantize_model(
                model,
                out,
                bits=bits,
                group_size=self.settings.group_size,
                calibration=self.calibration,
                samples=len(self.calibration),
                seq_len=self.calibration.shape[1],
                progress=False,
            )
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    def base(self, bits: int) -> nn.Module:
        """Return the embedded base, quantized unless `bits` is 16."""
        if bits == 16:
            return AutoModelForCausalLM.from_pretrained(base_model_path(), dtype=torch.float32)
        out = self.folder / f"base-{bits}bit-g{self.settings.group_size}"
        return self._quantized(base_model_path(), out, bits)

    def requantized(self, merged: nn.Module, bits: int) -> nn.Module:
        """Return a merged 16-bit model under our GPTQ."""
        with tempfile.TemporaryDirectory() as folder:
            return self._quantized(merged, Path(folder) / "merged", bits)

    def build(self, method: str, bits: int, seed: int) -> PeftModel:
        """Return the model that a method trains: PEFT's LoRA, PEQA, or our adapter in its mode."""
        model = self.base(16 if method in LORAS else bits)
        if method == "peqa":
            return peqa(model, seed)
        ranks = {"r": self.settings.rank, "lora_alpha": self.settings.alpha}
        if method in LORAS:
            torch.manual_seed(seed)
            return get_peft_model(model, LoraConfig(**ranks, target_modules="all-linear"))
        return get_peft_model(model, QALoRAConfig(**ranks, adapt=method, seed=seed))


def peqa(model: nn.Module, seed: int) -> PeftModel:
    """Return a model under PEQA (arXiv 2305.14152): scales are trained, zero-points stay.

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
    """Return the layers whose scales are trained."""
    return [m for m in model.modules() if isinstance(m, QALoRALinear) and m.qalora_scale_A]
