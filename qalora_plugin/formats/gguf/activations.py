"""What llama.cpp's rounding of activations does to our model: the bound on its logits.

ggml multiplies a quantized or 16-bit matrix with activations rounded to a type of its own
(`vec_dot_type` in ggml-cpu.c): Q4_1 with Q8_1, which is 8 bits in blocks of 32 with an f16 scale;
F16 with F16, BF16 with BF16, F32 with F32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ...checkpoint.checkpoint import QuantizedCheckpoint
from .blocks import BLOCK
from .weights import Weights


def q8_1(x: torch.Tensor) -> torch.Tensor:
    """Round activations [..., K] to Q8_1 and back (ggml-quants.c, `quantize_row_q8_1_ref`)."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0.0).round()
    return (codes * scales.half().float()).reshape(x.shape)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_1": q8_1,
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
}


@contextmanager
def rounded(model: nn.Module, exported: Path, source: QuantizedCheckpoint) -> Iterator[None]:
    """Within it, the model's layers round their inputs as llama.cpp does for this GGUF file."""
    handles = []
    for name, kind in Weights(exported, source).matrices().items():
        module = model.get_submodule(name.removesuffix(".weight"))
        # an embedding is looked up, not multiplied
        if kind in ROUNDINGS and not isinstance(module, nn.Embedding):
            handles.append(module.register_forward_pre_hook(_hook(ROUNDINGS[kind])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    rounding: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounding(args[0]), *args[1:])

    return hook
