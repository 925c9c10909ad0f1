"""INT-n operators of QA-LoRA: packing, dequantizing, the folded linear and its gradients.

No transformers, no peft, no device touched at import. `packed` is a layer's numbers as one value,
`ops` the operators, `autograd` the differentiable layers, `fold` the merge formula, `packing` the
bit order, `stored` what a checkpoint says, `reference` the oracle.
"""

from .autograd import folded_linear, quantized_linear
from .backends import get_backend
from .fold import LowRank, load_offsets, round_minimum, store_offsets
from .packed import PackedWeight
from .packing import pack, unpack
from .spec import OFFSETS_AT, SCALES_DTYPE, SUPPORTED_BITS, QuantSpec

__all__ = [
    "OFFSETS_AT",
    "SCALES_DTYPE",
    "SUPPORTED_BITS",
    "LowRank",
    "PackedWeight",
    "QuantSpec",
    "folded_linear",
    "get_backend",
    "load_offsets",
    "pack",
    "quantized_linear",
    "round_minimum",
    "store_offsets",
    "unpack",
]
