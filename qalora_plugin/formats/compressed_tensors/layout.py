"""The tensors of a pack-quantized layer.

compressed-tensors 0.11 to 0.20, `compressors/pack_quantized`; K inputs, N outputs, G groups:

    <name>.weight_packed      int32 [N, ceil(K * bits / 32)]  codes along the inputs, low bits first
    <name>.weight_scale       float [N, G]
    <name>.weight_zero_point  int32 [ceil(N * bits / 32), G]  along the outputs; only asymmetric
    <name>.weight_shape       int64 [2]                       N, K
    <name>.weight_g_idx       int32 [K]                       with act-order only

W[n, k] = weight_scale[n, g] * (code - zero_point), all codes unsigned; symmetric: zero_point is
2^(bits-1). For 2, 4 and 8 bits this is GPTQ's bit order, transposed. With others, versions before
0.20 leave the bits of a word free that hold no whole code.
"""

import torch

from qalora_kernels.packing import pack_columns, unpack_columns

WEIGHT, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
SHAPE, G_IDX = "weight_shape", "weight_g_idx"
SHAPE_DTYPE = torch.int64


def words(columns: int, bits: int) -> int:
    """Return the int32 words that hold so many codes of 2, 4 or 8 bits."""
    return -(-columns * bits // 32)


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack zero-points, integers [G, N] -> int32 [ceil(N * bits / 32), G]."""
    return pack_columns(zeros, bits).t().contiguous()


def unpack_zeros(packed: torch.Tensor, bits: int, out_features: int) -> torch.Tensor:
    """Undo `pack_zeros`: int32 [ceil(N * bits / 32), G] -> int32 [G, N]."""
    return unpack_columns(packed.t().contiguous(), bits, out_features).to(torch.int32)
