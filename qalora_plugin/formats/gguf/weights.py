"""Read a GGUF file's weights back with gguf-py, and bound what llama.cpp rounds.

ggml multiplies a quantized or 16-bit matrix with activations rounded to a type of its own
(`vec_dot_type` in ggml-cpu.c): Q4_1 and Q5_1 with Q8_1, which is 8 bits in blocks of 32 with an f16
scale, Q4_0, Q5_0 and Q8_0 with Q8_0, the same without a sum; K-quants with Q8_K, blocks of 256 and
an fp32 scale; F16 with F16, BF16 with BF16, F32 with F32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qalora_kernels import SCALES_DTYPE

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ..stacks import expert_stacks
from ..weights import ExactWeight, ExportedWeights
from . import FORMAT
from .blocks import BLOCK, TOP_CODE
from .file import open_gguf
from .metadata import Metadata

_F16, _F16_SUBNORMAL = 2.0**-11, 2.0**-25  # rounding: of a number, and of the smallest ones


class Weights(ExportedWeights):
    """Weights by gguf-py's `dequantize`, rows in Hugging Face's order."""

    def __init__(self, exported: Path, source: QuantizedCheckpoint) -> None:
        super().__init__(exported, source)
        self._gguf, self._metadata = FORMAT.library("gguf"), Metadata(source)
        self._names = self._metadata.tensor_names(source)
        self._tensors = {tensor.name: tensor for tensor in open_gguf(exported).tensors}
        self._numbers = {
            f"{layer}.weight": number
            for layers in expert_stacks(source).values()
            for number, layer in enumerate(layers)
        }

    def get(self, name: str) -> torch.Tensor | None:
        """Return one tensor; None of an output head that is the embedding."""
        if name not in self._names:
            return None
        stored = self._tensors.get(self._names[name])
        if stored is None:
            raise self.missing(name, self._names[name])
        data = stored.data[self._numbers[name]] if name in self._numbers else stored.data
        values = self._gguf.quants.dequantize(data, stored.tensor_type)
        value = torch.from_numpy(np.array(values, dtype=np.float32))
        if name.removesuffix(".weight") not in self.source.layers:
            value = value.view(self.source.reader.info(name).shape)  # a shared gate has one row
        if self._metadata.architecture.norm_plus_one and name.endswith("norm.weight"):
            value -= 1
        rows = self._metadata.in_pairs(name, torch.arange(value.shape[0]))
        return torch.empty_like(value).index_copy_(0, rows, value)

    def kind(self, name: str) -> str:
        """Return GGUF's type of a tensor, such as "Q4_1"."""
        return str(self._tensors[self._names[name]].tensor_type.name)

    def rounding(self, name: str, exact: ExactWeight) -> torch.Tensor:
        """Bound the rounding of minima in Q4_1, whose codes go up to 15, and of weights in F16."""
        kind, spec = self.kind(name), exact.spec
        of_f16 = spec.scales_dtype == SCALES_DTYPE
        if kind == "Q4_1" and not (of_f16 and spec.minimum_below):  # then all are f16 numbers
            codes = TOP_CODE + 1
            tiny = 0.0 if of_f16 else codes * _F16_SUBNORMAL
            return _F16 * (exact.offsets.abs() + exact.steps * codes) + tiny
        if kind == "F16":
            return _F16 * exact.values.abs() + _F16_SUBNORMAL
        return super().rounding(name, exact)

    def matrices(self) -> dict[str, str]:
        """Return GGUF's type of every weight; tied output embeddings have one of their own."""
        kinds = {
            name: self.kind(name)
            for name, stored in self._names.items()
            if name.endswith("weight") and stored in self._tensors
        }
        if "output.weight" not in self._tensors:
            kinds["lm_head.weight"] = self._tensors["token_embd.weight"].tensor_type.name
        return kinds


def q8_1(x: torch.Tensor) -> torch.Tensor:
    """Round activations [..., K] to Q8_1 and back (ggml-quants.c, `quantize_row_q8_1_ref`)."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0.0).round()
    return (codes * scales.half().float()).reshape(x.shape)


def q8_k(x: torch.Tensor) -> torch.Tensor:
    """Round activations [..., K] to Q8_K and back (ggml-quants.c, `quantize_row_q8_K_ref`)."""
    blocks = x.float().reshape(*x.shape[:-1], -1, 256)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scales > 0, blocks / scales, 0.0).round()
    return (codes * scales).reshape(x.shape)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), q8_1),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), q8_k),
    "F16": lambda x: x.half().float(),
    "BF16": lambda x: x.bfloat16().float(),
}


@contextmanager
def rounded(model: nn.Module, exported: Path, source: QuantizedCheckpoint) -> Iterator[None]:
    """Within it, the model's layers round their inputs as llama.cpp does for this GGUF file."""
    handles = []
    own = {getattr(m, "stored_name", None) or name: m for name, m in model.named_modules()}
    for name, kind in Weights(exported, source).matrices().items():
        module = own.get(name.removesuffix(".weight"))
        # an embedding is looked up, not multiplied
        if kind in ROUNDINGS and module is not None and not isinstance(module, nn.Embedding):
            hook = partial(_round_input, ROUNDINGS[kind])
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_input(
    rounding: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    args: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    return (rounding(args[0]), *args[1:])
