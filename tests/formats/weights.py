"""Weights of a checkpoint by the formula, how far others are from them; a tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from support.models import SIZES as _LLAMA

from qalora_kernels.groups import expand
from qalora_plugin.quickstart.embedded import base_model_path

FIXTURES = Path(__file__).parents[1] / "fixtures"
ACT_ORDER = FIXTURES / "gptq_4bit_g128_actorder_asym"
STOCK = FIXTURES / "gptq_4bit_g32_asym"
SIZES: dict[str, Any] = {
    **{key: value for key, value in _LLAMA.items() if key != "tie_word_embeddings"},
    "vocab_size": 2048,
    "num_hidden_layers": 1,
    "head_dim": 16,
}
BLOCKS_OF_32 = SIZES | {"intermediate_size": 96}


def exact_weight(source, name):
    """Return W [N, K] in float64: scales * (q - mid) + offsets."""
    layer = source.layer(name)
    codes = layer.codes().double() - layer.spec.mid
    return codes * _of_inputs(layer.scales, source, name) + _of_inputs(layer.offsets, source, name)


def error_in_steps(found, source, name):
    """Return the largest difference from the source's weights, in steps of the own group.

    Where a group has one weight, since its scale is 0, the step is the weight.
    """
    layer = source.layer(name)
    step = _of_inputs(torch.where(layer.scales == 0, layer.offsets, layer.scales), source, name)
    step = step.abs()
    return float(((found.double() - exact_weight(source, name)).abs() / step).max())


def _of_inputs(values, source, name):
    """[G, N] of groups -> float64 [N, K]."""
    layer = source.layer(name)
    return expand(values, layer.g_idx, layer.spec.group_size, layer.spec.in_features).t().double()


def with_tokenizer(source, target):
    """Copy a model, with the quickstart's tokenizer (2048 tokens) beside it."""
    shutil.copytree(source, target)
    for path in base_model_path().glob("*token*"):
        shutil.copy(path, target)
    return target
