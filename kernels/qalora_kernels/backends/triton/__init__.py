"""INT-n operators on Triton, for every dtype but float64. Contract: `backends`.

Importing this imports Triton but touches no device. On CPU tensors the kernels run under Triton's
interpreter only (TRITON_INTERPRET=1), for tests.
"""

from .dequantize import dequantize
from .groups import pool, pooled_grad, weighted_group_grad
from .matmul import grad_input, linear

__all__ = ["dequantize", "grad_input", "linear", "pool", "pooled_grad", "weighted_group_grad"]
