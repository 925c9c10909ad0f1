"""What the scales' gradient makes on its way: never the layer once more in fp32."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qalora_kernels import QuantSpec, packing, torch_backend


class _LargestFloat(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_scales_gradient_is_summed_block_by_block(dtype: torch.dtype) -> None:
    spec = QuantSpec(4, 128, 2048, 2048)
    codes = torch.zeros(2048, 2048, dtype=torch.uint8)
    scales = torch.full((spec.num_groups, 2048), 0.02)
    x, dy = torch.ones(4, 2048, dtype=dtype), torch.ones(4, 2048, dtype=dtype)
    with _LargestFloat() as largest:
        torch_backend.weighted_group_grad(dy, x, packing.pack(codes, 4), scales, scales, None, spec)
    assert 0 < largest.elements <= 2048 * 2048 // 4
