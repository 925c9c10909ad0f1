"""Integer zero-points, for the formats that store no others."""

import torch

from qalora_kernels import SCALES_DTYPE, PackedWeight, QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.format import Format
from ..errors import CheckpointError


def integer_zeros(where: str, weight: PackedWeight, format: Format) -> torch.Tensor:
    """Return the zero-points z = mid - offsets / scales of the layer at `where`, int32 [G, N].

    Raises:
        CheckpointError: one of them is not exactly an integer from 0 to 2^bits - 1.
    """
    if not torch.equal(weight.scales.to(SCALES_DTYPE).to(weight.scales), weight.scales):
        raise CheckpointError(
            f"{where}: has scales that float16 does not hold exactly, and {format.grids.holder} "
            "stores float16. Export to another format."
        )
    mid, scales, offsets = weight.spec.mid, weight.scales.double(), weight.offsets.double()
    # a scale of 0 holds no offset but 0, with any zero-point
    exact, top = mid - (offsets / scales).where(scales != 0, 0.0), 2 * mid - 1
    zeros = exact.round()
    wrong = scales * (mid - zeros) != offsets
    if wrong.any():
        distance = (exact - zeros).abs().amax().item()
        raise CheckpointError(
            f"{where}: {int(wrong.sum())} of {wrong.numel()} zero-points are not integers (up to "
            f"{distance:.3g} away), and {format.grids.holder} stores integers only. Quantize with "
            "`--zero-points integer` and adapt with adapt='scales', export to a format with "
            "real-valued offsets, or accept a measured loss: `qalora export MERGED --format "
            f"{format.name} --requantize --calibration FILE`."
        )
    if zeros.amin() < 0 or zeros.amax() > top:
        raise CheckpointError(
            f"{where}: zero-points from {int(zeros.amin())} to {int(zeros.amax())}; "
            f"{format.grids.holder} stores 0 to {top}. Export to a format with real-valued offsets."
        )
    return zeros.to(torch.int32)


def layer_of_zeros(
    where: str,
    spec: QuantSpec,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
) -> PackedWeight:
    """Return the layer W = scales * (q - zeros); its scales and offsets are exact in fp32.

    Args:
        where: of the scales, for messages.
        spec: the layer's grid, with offsets in fp32.
        qweight: int32 [ceil(K/32)*bits, N].
        scales: [G, N], as stored.
        zeros: integers [G, N].
        g_idx: int32 [K], or None.

    Raises:
        CheckpointError: a scale that the spec's dtype does not hold.
    """
    held = scales.to(spec.scales_dtype).float()
    if not torch.equal(held, scales.float()):
        raise CheckpointError(
            f"{where}: {scales.dtype} values that {spec.scales_dtype} does not hold exactly. "
            "Quantize the 16-bit model again with `qalora quantize`."
        )
    return PackedWeight(qweight, held, held * (spec.mid - zeros.int()).float(), g_idx, spec)


def has_integer_zeros(checkpoint: QuantizedCheckpoint, format: Format) -> bool:
    """Say whether every zero-point of a model is one that `integer_zeros` returns."""
    try:
        for name in checkpoint.layers:
            integer_zeros(name, checkpoint.layer(name), format)
    except CheckpointError:
        return False
    return True
