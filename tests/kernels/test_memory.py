"""What the scales' gradient makes on its way: never the layer once more in fp32."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.backends import torch as plain


class _LargestFloat(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


def test_the_scales_gradient_is_summed_block_by_block():
    spec = QuantSpec(4, 128, 2048, 2048)
    scales = torch.full((spec.num_groups, 2048), 0.02)
    codes = torch.zeros(2048, 2048, dtype=torch.uint8)
    weight = PackedWeight.from_codes(codes, scales, scales, None, spec)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, dy = torch.ones(4, 2048, dtype=dtype), torch.ones(4, 2048, dtype=dtype)
        with _LargestFloat() as largest:
            plain.weighted_group_grad(dy, x, weight)
        assert 0 < largest.elements <= 2048 * 2048 // 4, dtype
