"""`PackedWeight`: one quantized weight matrix, the value that every layer here passes on."""

import math
from dataclasses import dataclass, replace

import torch

from . import packing
from .fold import LowRank, fold
from .spec import QuantSpec

SCALES_DTYPE = torch.float16
"""dtype of `scales` in a checkpoint, the one of the GPTQ layout."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The numbers of one quantized linear layer, and their grid.

    W[n, k] = scales[g, n] * (q[n, k] - 2^(bits-1)) + offsets[g, n], with g the group of input k.

    Args:
        qweight: int32 [ceil(K/32)*bits, N], in the bit order of `packing`.
        scales: [G, N], any float dtype.
        offsets: [G, N], any float dtype: the weight at the middle code.
        g_idx: int32 [K], the group of each input, or None where that is k // group_size.
        spec: shape and grid.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    g_idx: torch.Tensor | None
    spec: QuantSpec

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        g_idx: torch.Tensor | None,
        spec: QuantSpec,
    ) -> "PackedWeight":
        """Pack integers [N, K] in [0, 2^bits); scales and offsets stay as they are given."""
        g_idx = None if g_idx is None else g_idx.to(torch.int32)
        return cls(packing.pack(codes.t(), spec.bits), scales, offsets, g_idx, spec)

    def __repr__(self) -> str:
        """Tell shape and grid, not the numbers."""
        order = "" if self.g_idx is None else ", act-order"
        return f"PackedWeight({self.spec}{order}, on {self.qweight.device})"

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the four tensors; `PackedWeight(*w.tensors, w.spec)` is `w` again."""
        return self.qweight, self.scales, self.offsets, self.g_idx

    @property
    def flat(self) -> tuple[torch.Tensor | int | None, ...]:
        """Return the weight as torch's dispatcher takes it, see `ops`."""
        spec = self.spec
        sizes = (spec.bits, spec.group_size, spec.in_features, spec.out_features)
        return (*self.tensors, *sizes)

    def codes(self) -> torch.Tensor:
        """Return the integers, uint8 [N, K], contiguous."""
        spec = self.spec
        return packing.unpack(self.qweight, spec.bits, spec.in_features).t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return W^T [K, N] in `dtype`, computed in fp32 (fp64 for float64) and rounded once.

        Raises:
            ValueError: a tensor's shape, dtype, device or values do not fit (`checks`).
        """
        return torch.ops.qalora.dequantize(*self.flat, dtype)

    def columns(self, part: slice) -> "PackedWeight":
        """Return the weight of some of the N outputs."""
        qweight = self.qweight[:, part].contiguous()
        spec = replace(self.spec, out_features=qweight.shape[1])
        return PackedWeight(qweight, self.scales[:, part], self.offsets[:, part], self.g_idx, spec)

    def inputs(self, start: int, stop: int) -> "PackedWeight":
        """Return the weight of the inputs from `start` up to `stop`, for a layer cut along K.

        The integers and the numbers of each weight stay the same; the grid may not. A cut inside
        of a group makes the groups smaller (or lists each input's group, with act-order), and one
        inside of 32 packed inputs packs the integers anew.

        Raises:
            ValueError: not 0 <= start < stop <= K.
        """
        k, bits = self.spec.in_features, self.spec.bits
        if not 0 <= start < stop <= k:
            raise ValueError(f"expected a range within 0 to {k}, found {start} to {stop}")
        if start % 32 == 0 and (stop % 32 == 0 or stop == k):
            qweight = self.qweight[start // 32 * bits : -(-stop // 32) * bits].contiguous()
        else:
            codes = packing.unpack(self.qweight, bits, k)[start:stop]
            qweight = packing.pack(codes, bits)
        used, group_size, g_idx = self.groups_of(start, stop)
        scales, offsets = (values[used].contiguous() for values in (self.scales, self.offsets))
        spec = replace(self.spec, in_features=stop - start, group_size=group_size)
        return PackedWeight(qweight, scales, offsets, g_idx, spec)

    def groups_of(self, start: int, stop: int) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        """Return the groups that a range of inputs needs, their size, and each input's place.

        These are the rows of scales and offsets that `inputs` keeps, int64; one may be repeated.
        """
        if self.g_idx is None:
            group_size = math.gcd(self.spec.group_size, start)
            starts = torch.arange(start, stop, group_size, device=self.qweight.device)
            return starts // self.spec.group_size, group_size, None
        used, g_idx = torch.unique(self.g_idx[start:stop].long(), return_inverse=True)
        # a spec counts ceil(inputs / group_size) groups: what that is too many is never looked at
        group_size = max(1, (stop - start - 1) // max(1, len(used) - 1))
        spare = used[-1:].expand(-(-(stop - start) // group_size) - len(used))
        return torch.cat((used, spare)), group_size, g_idx.to(torch.int32)

    def fold(self, zeros: LowRank | None, scale: LowRank | None) -> "PackedWeight":
        """Return the merged weight, see `fold.fold`: this one where there is no change."""
        return self if zeros is None and scale is None else fold(self, zeros, scale)
