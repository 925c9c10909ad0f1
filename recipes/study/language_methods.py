"""The models of the study of a language model, one a method; bases are made once and kept."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from language_tasks import LanguageTask, Sizes
from methods import peqa
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from qalora_plugin import QALoRAConfig, quantize_model
from qalora_plugin.layers.linear import QuantLinear

RANK, ALPHA = 16, 32
ADAPTED = ("peqa", "use_qalora", "zeros", "scales", "both", "both refined", "both auto")
REQUANTIZED = ("lora+gptq", "qlora+gptq")
METHODS = ("lora", *REQUANTIZED, *ADAPTED)


@dataclass(frozen=True)
class LanguageModels:
    """Makes the models of one task.

    Args:
        source: directory of the 16-bit model.
        folder: where quantized bases are kept.
        task: whose training text calibrates.
        sizes: of calibration windows.
        refine_steps: of refining, where a method has it.
    """

    source: Path
    folder: Path
    task: LanguageTask
    sizes: Sizes
    refine_steps: int = 250

    def _options(self, bits: int, group_size: int) -> dict[str, Any]:
        return {
            "bits": bits,
            "group_size": group_size,
            "calibration": self.task.text,
            "samples": self.sizes.calibration,
            "seq_len": self.sizes.window,
            "progress": False,
        }

    def _load(self, directory: Path) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def base(self, kind: str, bits: int, group_size: int) -> nn.Module:
        """Return the 16-bit model (`bits` 16), or it under our GPTQ: plain, "refined", "auto"."""
        if bits == 16:
            return self._load(self.source)
        out = self.folder / f"{self.task.name}-{kind}-{bits}bit-g{group_size}"
        if not out.is_dir():
            options = self._options(bits, group_size)
            if kind == "refined":
                options |= {"refine": True, "refine_steps": self.refine_steps}
            if kind == "auto":
                options |= {"bits": "auto", "target_bits": float(bits)}
            quantize_model(self.source, out, **options)
        return self._load(out)

    def requantized(
        self, merged: nn.Module, bits: int, group_size: int, tokenizer: Any
    ) -> nn.Module:
        """Return a merged 16-bit model under our GPTQ."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            out = Path(folder) / "quantized"
            options = self._options(bits, group_size)
            quantize_model(merged, out, tokenizer=tokenizer, **options)
            return self._load(out)

    def build(self, method: str, bits: int, group_size: int, seed: int) -> PeftModel:
        """Return the model that a method trains."""
        kind = {"both refined": "refined", "both auto": "auto"}.get(method, "plain")
        sixteen = method in ("lora", "lora+gptq")
        model = self.base(kind, 16 if sixteen else bits, group_size)
        if method == "peqa":
            return peqa(model, seed)
        ranks = {"r": RANK, "lora_alpha": ALPHA}
        if method in ("lora", *REQUANTIZED):
            torch.manual_seed(seed)
            if method == "qlora+gptq":
                model = dense(model)
            return get_peft_model(model, LoraConfig(**ranks, target_modules="all-linear"))
        if method == "use_qalora":  # PEFT's: the mean over a group, times the number of groups
            layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
            factors = {n: m.spec.num_groups / m.spec.group_size for n, m in layers.items()}
            alphas = {name: ALPHA * factor for name, factor in factors.items()}
            return get_peft_model(model, QALoRAConfig(**ranks, alpha_pattern=alphas, seed=seed))
        return get_peft_model(model, QALoRAConfig(**ranks, adapt=method.split()[0], seed=seed))


def dense(model: nn.Module) -> nn.Module:
    """Return a quantized model with its weights written out in bf16: QLoRA's frozen base."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, False, device="meta")
            weight = module.packed.dequantize(torch.bfloat16).t().contiguous()
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    # it is a 16-bit model now, for those who ask
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model
