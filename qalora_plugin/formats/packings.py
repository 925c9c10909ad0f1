"""Layers of qweight, qzeros and scales with integer zero-points, in the packings that are in use.

    W[n, k] = scales[g, n] * (q - z)        g = k // group_size; scales fp16 [G, N]

`ALONG_INPUTS` is AutoGPTQ's packing, `ALONG_OUTPUTS` AutoAWQ's for its GEMM kernel:

    along inputs   qweight int32 [K * bits / 32, N]    qzeros int32 [G, N * bits / 32]
    along outputs  qweight int32 [K, N * bits / 32]    qzeros int32 [G, N * bits / 32]

AutoAWQ 0.2.9 (`awq/utils/packing_utils.py`): the 8 codes of a word are those of outputs 0, 2, 4, 6,
1, 3, 5, 7, low bits first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.config import QALoRAQuantConfig
from ..errors import CheckpointError, ConfigError
from ..files.reader import CheckpointReader

if TYPE_CHECKING:  # headers are checked without it
    import torch

    from qalora_kernels import PackedWeight

AWQ_BITS = 4
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
QUANTIZE_AGAIN = "Quantize the 16-bit model again with `qalora quantize`."
_DAMAGED = "The checkpoint is damaged or incomplete: copy or download it again."


@dataclass(frozen=True)
class Packing:
    """How codes lie in the words of qweight and qzeros.

    Args:
        along_outputs: whether qweight is packed along the outputs, as AutoAWQ does.
        stored_below: by how much a stored zero-point is below the real one (1 in GPTQ's v1).
    """

    along_outputs: bool
    stored_below: int = 0

    def sizes(self, shape: tuple[int, ...], bits: int) -> tuple[int, int]:
        """Return K and N of a qweight of this shape."""
        rows, columns = shape
        if self.along_outputs:
            return rows, columns * 32 // bits
        return rows * 32 // bits, columns

    def shapes(self, spec: QuantSpec) -> dict[str, tuple[int, int]]:
        """Return the shape of every tensor of a layer."""
        k, n, groups = spec.in_features, spec.out_features, spec.num_groups
        words = n * spec.bits // 32
        qweight = (k, words) if self.along_outputs else (k * spec.bits // 32, n)
        return {"qweight": qweight, "qzeros": (groups, words), "scales": (groups, n)}

    def qweight(self, packed: "torch.Tensor", spec: QuantSpec) -> "torch.Tensor":
        """Return the integers in our packing, int32 [ceil(K/32)*bits, N]."""
        from qalora_kernels import pack

        if self.along_outputs:
            return pack(_in_order(packed, spec), spec.bits)
        return packed

    def zeros(self, packed: "torch.Tensor", spec: QuantSpec) -> "torch.Tensor":
        """Return the zero-points, int32 [G, N]."""
        from qalora_kernels.packing import unpack_columns

        if self.along_outputs:
            stored = _in_order(packed, spec)
        else:
            stored = unpack_columns(packed, spec.bits, spec.out_features)
        return stored.int() + self.stored_below


ALONG_INPUTS = Packing(False)
ALONG_INPUTS_V1 = Packing(False, 1)
ALONG_OUTPUTS = Packing(True)


def _in_order(packed: "torch.Tensor", spec: QuantSpec) -> "torch.Tensor":
    """Return codes that were packed along the outputs in AutoAWQ's order, uint8 [rows, N]."""
    from qalora_kernels.packing import unpack_columns

    words = unpack_columns(packed, spec.bits, spec.out_features).unflatten(1, (-1, 8))
    codes = words.new_empty(words.shape)
    codes[..., list(_AWQ_ORDER)] = words
    return codes.flatten(1)


def scales_dtype(reader: CheckpointReader, part: str = "scales") -> str:
    """Return the dtype that holds all scales of a base, to which training rounds: fp16 or bf16.

    Args:
        reader: of the base.
        part: last part of the name of a layer's scales.
    """
    suffix = f".{part}"
    stored = {i.dtype_name for name, i in reader.tensors.items() if name.endswith(suffix)}
    return "bfloat16" if stored == {"bfloat16"} else "float16"


def integer_config(bits: Any, group_size: Any, path: Path) -> QALoRAQuantConfig:
    """Return our config of a base with integer zero-points; offsets are held in fp32, exactly.

    Args:
        bits: as the foreign config.json states them.
        group_size: likewise.
        path: of that config.json, for messages.

    Raises:
        CheckpointError: bits or group size are none of ours.
    """
    try:
        return QALoRAQuantConfig(bits, group_size, offsets_dtype="float32", method="other")
    except ConfigError as error:
        why = str(error).removeprefix("quantization_config: ")
        raise CheckpointError(f"{path}: {why}. {QUANTIZE_AGAIN}") from error


def check_integers(
    checkpoint: QuantizedCheckpoint,
    packing: Packing,
    grid_of: Callable[[str], tuple[int, int]],
) -> dict[str, QuantSpec]:
    """Check every layer's tensors, from the headers.

    Args:
        checkpoint: whose reader is open.
        packing: of its layers.
        grid_of: gives bits and group size of a layer by its name.

    Returns:
        The grid of every quantized layer by name.

    Raises:
        CheckpointError: no layer, or one with a tensor that is missing, or of another dtype or
            shape than its grid says.
    """
    reader = checkpoint.reader
    names = [n.removesuffix(".qweight") for n in reader.tensors if n.endswith(".qweight")]
    if not names:
        raise CheckpointError(f"{reader.directory}: no tensor is a qweight. {_DAMAGED}")
    dtype = scales_dtype(reader)
    return {name: _check_layer(reader, packing, name, *grid_of(name), dtype) for name in names}


def _check_layer(
    reader: CheckpointReader, packing: Packing, name: str, bits: int, group_size: int, dtype: str
) -> QuantSpec:
    info = reader.info(f"{name}.qweight")
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: {info.name}: expected two sizes, found {info.shape}. {_DAMAGED}"
        )
    spec = QuantSpec(bits, group_size, *packing.sizes(info.shape, bits), "float32", dtype)
    if spec.out_features * bits % 32 or (spec.in_features % 32 and not packing.along_outputs):
        raise CheckpointError(
            f"{info.file}: {name}: expected sizes that fill whole words of 32 bits, found "
            f"{spec.in_features} inputs and {spec.out_features} outputs of {bits} bits. The layer "
            f"was cut off by its quantizer. {QUANTIZE_AGAIN}"
        )
    for part, shape in packing.shapes(spec).items():
        if f"{name}.{part}" not in reader:
            raise CheckpointError(f"{reader.directory}: {name}.{part} is missing. {_DAMAGED}")
        info = reader.info(f"{name}.{part}")
        fits = info.is_float if part == "scales" else info.dtype_name == "int32"
        if not fits or info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {info.name}: expected {'floats' if part == 'scales' else 'int32'} "
                f"{list(shape)} for bits={bits}, group_size={group_size}, "
                f"in_features={spec.in_features}, found {info.dtype_name} {list(info.shape)}. The "
                f"config contradicts the tensors. {QUANTIZE_AGAIN}"
            )
    return spec


def read_integers(checkpoint: QuantizedCheckpoint, packing: Packing, name: str) -> "PackedWeight":
    """Read one layer that `check_integers` has checked; its offsets are exact in fp32."""
    from .zero_points import layer_of_zeros

    spec, reader = checkpoint.layers[name], checkpoint.reader
    zeros = packing.zeros(reader.get(f"{name}.qzeros"), spec)
    scales, where = reader.get(f"{name}.scales"), f"{checkpoint.where(name)}.scales"
    return layer_of_zeros(where, spec, checkpoint.qweight(name), scales, zeros, None)
