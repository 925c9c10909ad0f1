"""Weights of a checkpoint by the reference formula, and how far others are from them."""

from pathlib import Path

import torch

from qalora_kernels.groups import expand
from qalora_plugin.additive import dense
from qalora_plugin.checkpoint.base import QuantizedCheckpoint

ACT_ORDER = Path(__file__).parent.parent / "fixtures" / "gptq_4bit_g128_actorder_asym"


def exact_weight(source: QuantizedCheckpoint, name: str) -> torch.Tensor:
    """W [N, K] in float64, by the kernels' reference formula."""
    return dense(source.layer(name), source.layers[name]).t()


def error_in_steps(found: torch.Tensor, source: QuantizedCheckpoint, name: str) -> float:
    """Largest difference of a weight from the source's, in steps of its own group's scale."""
    spec, layer = source.layers[name], source.layer(name)
    step = expand(layer.scales, layer.g_idx, spec.group_size, spec.in_features).t()
    return float(((found.double() - exact_weight(source, name)).abs() / step).max())
