"""GGUF's K-quants (ggml-common.h, ggml-quants.c) in our packing, with scales and minima in fp32.

A block is 256 inputs of one row, of which 32 (16 in Q6_K) share a scale and a minimum; these are
integers of 6 bits (8 in Q6_K) times one f16 number a block each:

    Q4_K  144 bytes  d, dmin, 12 bytes of scales and minima, 128 of low bits           4 bits
    Q5_K  176 bytes  d, dmin, 12 bytes of scales and minima, 32 of high, 128 of low    in 8 bits
    Q6_K  210 bytes  128 of low bits, 64 of high, 16 signed scales, d                  in 8 bits

    W = (d * scale) * code - dmin * minimum         Q6_K: W = (d * scale) * (code - 32)

Both products are exact in fp32. Nothing goes back: a trained minimum is no multiple of dmin.
"""

import torch

from .headers import K_TYPES

_INPUTS = 256


def read_k(name: str, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode rows of blocks.

    Args:
        name: of the type.
        raw: uint8 [N, bytes of a row].

    Returns:
        Words of `qweight` int32 [N, K / 32 * bits], scales and minima fp32 [N, G].
    """
    kind, n = K_TYPES[name], len(raw)
    blocks = raw.view(n, -1, kind.nbytes)
    codes, scales, minima = _six(blocks) if name == "Q6_K" else _four_or_five(name, blocks)
    codes = codes.reshape(n, -1, _INPUTS)
    if kind.bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    words = codes.contiguous().view(torch.int32).view(n, -1)
    return words, scales.reshape(n, -1), minima.reshape(n, -1)


def _f16(raw: torch.Tensor) -> torch.Tensor:
    return raw.contiguous().view(torch.float16).float()


def _four_or_five(
    name: str, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = blocks[..., 4:16]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), -1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), -1)
    low = blocks[..., -128:].unflatten(-1, (4, 1, 32))
    codes = torch.cat((low & 15, low >> 4), -2).flatten(-3, -2)  # [..., 8, 32]
    if name == "Q5_K":
        shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
        codes = codes | (blocks[..., 16:48].unsqueeze(-2) >> shifts & 1) << 4
    d, dmin = _f16(blocks[..., :2]), _f16(blocks[..., 2:4])
    return codes, d * scales.float(), -dmin * minima.float()


def _six(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = blocks[..., :128].unflatten(-1, (2, 1, 64))
    low = torch.cat((low & 15, low >> 4), -2).unflatten(-1, (2, 32)).flatten(-3, -2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(-1)
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3
    signed = blocks[..., 192:208].contiguous().view(torch.int8)
    scales = _f16(blocks[..., 208:]) * signed.float()
    return low | high << 4, scales, -32 * scales
