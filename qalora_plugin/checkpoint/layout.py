"""A quantized linear layer's tensors: written, and read back.

`qalora_kernels.stored` says which they are.
"""

import re
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from qalora_kernels import QuantSpec
from qalora_kernels.stored import GUARD, GUARD_DTYPE_NAME

from ..errors import CheckpointError
from ..files.reader import CheckpointReader

if TYPE_CHECKING:
    import torch

    from qalora_kernels import PackedWeight

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)")


def guard_tensor(in_features: int) -> "torch.Tensor":
    """Return the guard, of shape [1], which holds K."""
    import torch

    return torch.tensor([in_features], dtype=getattr(torch, GUARD_DTYPE_NAME))


def pack_layer(name: str, weight: "PackedWeight") -> "dict[str, torch.Tensor]":
    """Return a layer's tensors as `layer_plan` names them, in their stored dtypes."""
    import torch

    from qalora_kernels import store_offsets

    tensors = {
        f"{name}.qweight": weight.qweight,
        f"{name}.scales": weight.scales.to(weight.spec.scales_dtype),
        f"{name}.offsets": store_offsets(weight.offsets, weight.scales, weight.spec),
        f"{name}.{GUARD}": guard_tensor(weight.spec.in_features),
    }
    if weight.g_idx is not None:
        tensors[f"{name}.g_idx"] = weight.g_idx.to(torch.int32)
    return tensors


def read_layer(
    reader: CheckpointReader, name: str, spec: QuantSpec, *, integers: bool = True
) -> "PackedWeight":
    """Return the layer that `pack_layer` stored, its scales and offsets in fp32.

    Without `integers` its qweight is not read: it has a shape alone, on the meta device.
    """
    import torch

    from qalora_kernels import PackedWeight, load_offsets

    scales = reader.get(f"{name}.scales").float()
    offsets = load_offsets(reader.get(f"{name}.offsets"), scales, spec).float()
    g_idx = reader.get(f"{name}.g_idx") if f"{name}.g_idx" in reader else None
    if integers:
        qweight = reader.get(f"{name}.qweight")
    else:
        shape = (spec.packed_rows, spec.out_features)
        qweight = torch.empty(shape, dtype=torch.int32, device="meta")
    return PackedWeight(qweight, scales, offsets, g_idx, spec)


def quantized_layers(names: Iterable[str]) -> list[str]:
    """Return the layers that have a `qweight` among these tensor names, in their order."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


class ExpertPlace(NamedTuple):
    """The place of a layer that is one projection of one expert: `mlp.experts`, 3, `up_proj`."""

    experts: str
    number: int
    projection: str


def expert_place(layer: str) -> ExpertPlace | None:
    """Return where in a mixture a layer is, by its name; None of one that is no expert's."""
    found = _EXPERT.fullmatch(layer)
    return None if found is None else ExpertPlace(found[1], int(found[2]), found[3])


def read_in_features(reader: CheckpointReader, name: str) -> int:
    """Return K of a quantized layer, as its guard says.

    Raises:
        CheckpointError: the layer has no guard, or not a positive whole number in it.
    """
    guard = f"{name}.{GUARD}"
    if guard not in reader:
        raise CheckpointError(
            f"{reader.directory}: {name} has a qweight but no guard tensor {guard}. "
            "Write the checkpoint again with qalora or save_pretrained."
        )
    info = reader.info(guard)
    if info.shape != (1,) or info.dtype_name != GUARD_DTYPE_NAME:
        raise CheckpointError(
            f"{info.file}: {guard}: expected the guard, {GUARD_DTYPE_NAME} of shape (1,), found "
            f"{info.dtype_name} of shape {info.shape}. The layer is stored twice: remove the dense "
            "one."
        )
    (value,) = struct.unpack("<f", b"".join(reader.chunks(guard)))
    if not value.is_integer() or value < 1:
        raise CheckpointError(f"{info.file}: {guard}: expected in_features, found {value}.")
    return int(value)
