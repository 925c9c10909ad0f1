"""INT-n operators of QA-LoRA: packing, dequantizing, the folded linear and its gradients.

No transformers, no peft, no device touched at import; torch is imported with the first name that
needs it. `packed` is a layer's numbers as one value, `ops` the operators, `autograd` the
differentiable layers, `fold` the merge formula, `packing` the bit order, `stored` what a checkpoint
says, `reference` the oracle.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .lazy import lazy_names
from .spec import OFFSETS_AT, SUPPORTED_BITS, QuantSpec

if TYPE_CHECKING:
    from .autograd import folded_linear, grid_linear, quantized_linear
    from .backends import get_backend
    from .fold import LowRank, load_offsets, round_minimum, store_offsets
    from .ops import pack_halves
    from .packed import SCALES_DTYPE, PackedWeight
    from .packing import pack, unpack

_LAZY = {
    "LowRank": ".fold",
    "PackedWeight": ".packed",
    "SCALES_DTYPE": ".packed",
    "folded_linear": ".autograd",
    "get_backend": ".backends",
    "grid_linear": ".autograd",
    "load_offsets": ".fold",
    "pack": ".packing",
    "pack_halves": ".ops",
    "quantized_linear": ".autograd",
    "round_minimum": ".fold",
    "store_offsets": ".fold",
    "unpack": ".packing",
}

__all__ = [
    "OFFSETS_AT",
    "SCALES_DTYPE",
    "SUPPORTED_BITS",
    "LowRank",
    "PackedWeight",
    "QuantSpec",
    "folded_linear",
    "get_backend",
    "grid_linear",
    "load_offsets",
    "pack",
    "pack_halves",
    "quantized_linear",
    "round_minimum",
    "store_offsets",
    "unpack",
]


_lazy = lazy_names(__name__, _LAZY)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, the operators with it: `PackedWeight` calls them."""
    value = globals()[name] = _lazy(name)
    importlib.import_module(".ops", __name__)
    return value
