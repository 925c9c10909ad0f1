"""The bit order of packed integers; the only file that knows it.

GPTQ's layout (AutoGPTQ 0.7.1, `nn_modules/qlinear/qlinear_cuda_old.py`, `pack`): along the packed
axis, the values of 32 consecutive positions form one little-endian bit stream of `bits` 32-bit
words, value i at bits [i*bits, (i+1)*bits). For 3 bits a value may straddle two words. Positions
past the end are zero.
"""

import torch

_VALUES = 32  # positions in one stream; 32 * bits is a whole number of words for every width
_WORD = 32
_LOW_HALVES = 0x0F0F0F0F0F0F0F0F
_PAIRS, _QUADS = 0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first axis, as `qweight` is packed along the inputs.

    Args:
        codes: integers [K, N] in [0, 2^bits).
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [ceil(K/32)*bits, N].
    """
    k, n = codes.shape
    streams = -(-k // _VALUES)
    padded = torch.zeros(streams * _VALUES, n, dtype=torch.int64, device=codes.device)
    padded[:k] = codes
    padded = padded.view(streams, _VALUES, n)
    words = torch.zeros(streams, bits, n, dtype=torch.int64, device=codes.device)
    for i in range(_VALUES):
        word, shift = divmod(i * bits, _WORD)
        words[:, word] |= (padded[:, i] << shift) & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[:, word + 1] |= padded[:, i] >> (_WORD - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)  # the same 32 bits
    return signed.to(torch.int32).view(streams * bits, n)


def unpack(qweight: torch.Tensor, bits: int, in_features: int) -> torch.Tensor:
    """Undo `pack`: int32 [ceil(K/32)*bits, N] -> uint8 [K, N]."""
    rows, n = qweight.shape
    streams = rows // bits
    mask = (1 << bits) - 1
    out = torch.empty(streams, _VALUES, n, dtype=torch.uint8, device=qweight.device)
    words = qweight.view(streams, bits, n)
    if _WORD % bits == 0:
        per_word = _WORD // bits
        by_word = out.view(streams, bits, per_word, n)
        for j in range(per_word):
            # the arithmetic shift's sign bits are masked away
            by_word[:, :, j] = ((words >> (j * bits)) & mask).to(torch.uint8)
    else:
        for i in range(_VALUES):
            word, shift = divmod(i * bits, _WORD)
            value = words[:, word] >> shift
            if shift + bits > _WORD:
                low = (1 << (_WORD - shift)) - 1
                value = (value & low) | (words[:, word + 1] << (_WORD - shift))
            out[:, i] = (value & mask).to(torch.uint8)
    return out.view(streams * _VALUES, n)[:in_features]


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the last axis, as `qzeros` is: [G, N] -> int32 [G, ceil(N/32)*bits].

    Where the stock format pads less than a full stream (N * bits a multiple of 32 but N not of 32,
    for 2, 4 and 8 bits), only the words that hold values are kept.
    """
    packed = pack(codes.t().contiguous(), bits).t().contiguous()
    return packed[:, : -(-codes.shape[1] * bits // _WORD)]


def unpack_columns(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo `pack_columns`: int32 [G, words] -> uint8 [G, columns]."""
    rows = -(-columns // _VALUES) * bits
    words = torch.zeros(rows, packed.shape[0], dtype=torch.int32, device=packed.device)
    words[: packed.shape[1]] = packed.t()
    return unpack(words, bits, columns).t().contiguous()


def pack_halves(halves: torch.Tensor, out: torch.Tensor) -> None:
    """Pack 4-bit codes of which a byte holds two, 16 inputs apart, as GGUF and llama.cpp have them.

    Args:
        halves: uint8 [N, S, 16] of S streams of 32 inputs: byte i holds inputs i (low) and i + 16.
        out: int32 [4*S, N], rows of `qweight`; it is written.
    """
    n, streams, _ = halves.shape
    # a clone starts where int64 may
    pairs = halves.clone(memory_format=torch.contiguous_format).view(torch.int64)
    words = torch.empty(n, streams, 4, dtype=torch.int32)
    for place, shift in ((0, 0), (2, 4)):
        x = pairs >> shift & _LOW_HALVES  # eight codes, a byte each
        x = (x | x >> 4) & _PAIRS
        x = (x | x >> 8) & _QUADS
        words[..., place : place + 2] = (x | x >> 16).to(torch.int32)  # keeps the low 32 bits
    out.copy_(words.view(n, 4 * streams).t())
