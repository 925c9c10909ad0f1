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

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # headers are checked without it
    import torch

WEIGHT, SCALE, ZERO_POINT = "weight_packed", "weight_scale", "weight_zero_point"
SHAPE, G_IDX = "weight_shape", "weight_g_idx"
PARTS = (WEIGHT, SCALE, ZERO_POINT, SHAPE, G_IDX)


def words(columns: int, bits: int) -> int:
    """Return the int32 words that hold so many codes, as GPTQ packs them."""
    return -(-columns * bits // 32)


def unpack_columns_of(packed: "torch.Tensor", bits: int, columns: int) -> "torch.Tensor":
    """Return the codes along the last axis, int32 [rows, words] -> uint8 [rows, columns].

    3 bits are dense, or 10 in a word as versions before 0.20 pack them: the width tells.
    """
    import torch

    from qalora_kernels.packing import unpack_columns

    if packed.shape[1] == words(columns, bits):
        return unpack_columns(packed, bits, columns)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = packed.unsqueeze(-1) >> shifts & (1 << bits) - 1  # the sign's bits are masked away
    return codes.flatten(1)[:, :columns].to(torch.uint8)


def pack_zeros(zeros: "torch.Tensor", bits: int) -> "torch.Tensor":
    """Pack zero-points, integers [G, N] -> int32 [ceil(N * bits / 32), G]."""
    from qalora_kernels.packing import pack_columns

    return pack_columns(zeros, bits).t().contiguous()
