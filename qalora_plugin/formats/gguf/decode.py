"""GGUF's affine block types (ggml-common.h) in our packing: the same codes, scales and minima.

A block is 32 inputs of one row: W = d * code + m.

    type  bytes  d at  m at  high bits at  low bits at  code of 0   our bits
    Q4_0    18     0     -         -            2           8           4
    Q4_1    20     0     2         -            4           -           4
    Q5_0    22     0     -         2            6          16           8
    Q5_1    24     0     2         4            8           -           8
    Q8_0    34     0     -         -            2         128           8

Byte i of the low bits holds inputs i (low four bits) and i + 16; bit i of the high bits, a 32-bit
number, is bit 4 of input i. Q8_0 holds signed bytes. Where there is no m, it is -d * (code of 0),
which f16 holds as it holds d: a power of two times it.
"""

import torch

from qalora_kernels import pack_halves

from .headers import BlockType


def read_scales(kind: BlockType, raw: torch.Tensor) -> torch.Tensor:
    """Return d of blocks uint8 [..., nbytes], fp16 [...]."""
    return raw.view(torch.float16)[..., 0]


def read_minima(kind: BlockType, raw: torch.Tensor) -> torch.Tensor:
    """Return m of blocks uint8 [..., nbytes], fp16 [...]."""
    if kind.zero is None:
        return raw.view(torch.float16)[..., 1]
    return minima_of(kind, read_scales(kind, raw))


def minima_of(kind: BlockType, scales: torch.Tensor) -> torch.Tensor:
    """Return m of blocks without one, from d."""
    assert kind.zero is not None
    return scales * -kind.zero


def write_words(kind: BlockType, raw: torch.Tensor, out: torch.Tensor) -> None:
    """Write the codes of blocks uint8 [N, B, nbytes] to `out` int32 [B*bits, N], as in `qweight`.

    The 32 codes of a block are one stream of `qalora_kernels.packing`.
    """
    n, blocks, _ = raw.shape
    if kind.bits == 4:
        pack_halves(raw[..., kind.low :], out)
        return
    if kind.high is None:
        codes = raw[..., kind.low :] ^ 0x80  # signed bytes + 128
    else:
        low = raw[..., kind.low :]
        shifts = torch.arange(8, dtype=torch.uint8)
        high = raw[..., kind.high : kind.high + 4].unsqueeze(-1) >> shifts & 1
        codes = torch.cat((low & 0xF, low >> 4), -1) | high.view(n, blocks, 32) << 4
    out.copy_(codes.contiguous().view(torch.int32).view(n, -1).t())
