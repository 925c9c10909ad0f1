"""Weights of a checkpoint by the reference formula, how far others are from them; a tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch

from qalora_kernels.groups import expand
from qalora_plugin.checkpoint.checkpoint import QuantizedCheckpoint
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.verify.additive import dense

ACT_ORDER = Path(__file__).parent.parent / "fixtures" / "gptq_4bit_g128_actorder_asym"
SIZES: dict[str, Any] = dict(
    vocab_size=2048,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
)


def exact_weight(source: QuantizedCheckpoint, name: str) -> torch.Tensor:
    """W [N, K] in float64, by the kernels' reference formula."""
    return dense(source.layer(name)).t()


def error_in_steps(found: torch.Tensor, source: QuantizedCheckpoint, name: str) -> float:
    """Largest difference of a weight from the source's, in steps of its own group's scale."""
    spec, layer = source.layers[name], source.layer(name)
    step = expand(layer.scales, layer.g_idx, spec.group_size, spec.in_features).t()
    return float(((found.double() - exact_weight(source, name)).abs() / step).max())


def with_tokenizer(source: Path, target: Path) -> Path:
    """A copy of a model with the quickstart's tokenizer (2048 tokens)."""
    shutil.copytree(source, target)
    for path in base_model_path().glob("*token*"):
        shutil.copy(path, target)
    return target
