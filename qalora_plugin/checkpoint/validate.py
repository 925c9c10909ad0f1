"""Check that config.json describes the tensors that are there, and that numbers are sound.

Shapes and dtypes come from the file headers alone; values are checked when a layer is read.
"""

from typing import TYPE_CHECKING

from qalora_kernels import SUPPORTED_BITS, QuantSpec
from qalora_kernels.stored import GUARD, is_excluded, layer_header

from ..errors import CheckpointError
from ..files.names import CONFIG_FILE
from ..files.reader import CheckpointReader, all_finite
from .config import QALoRAQuantConfig
from .layout import quantized_layers, read_in_features

if TYPE_CHECKING:
    import torch

    from qalora_kernels import PackedWeight

_LAYER_TENSORS = {"qweight", "scales", "offsets", "g_idx", "bias", GUARD}
_INCOMPLETE = "The checkpoint is incomplete: write or copy it again."
_BAD_VALUES = "The file is damaged, or was quantized wrongly: copy it, or quantize, again."


def check_layers(reader: CheckpointReader, config: QALoRAQuantConfig) -> dict[str, QuantSpec]:
    """Check every quantized layer's tensors against the config, from the headers.

    Returns:
        The grid of every quantized layer by name.

    Raises:
        CheckpointError: no layer, or one with a tensor that is missing, surplus, or of another
            dtype or shape than the config says.
    """
    names = quantized_layers(reader.tensors)
    if not names:
        raise CheckpointError(
            f"{reader.directory}: {CONFIG_FILE} says quant_method {config.quant_method!r}, but no "
            "tensor is a qweight. The weights belong to another checkpoint: copy both from one."
        )
    parts: dict[str, set[str]] = {}
    for tensor in reader.tensors:
        layer, _, part = tensor.rpartition(".")
        parts.setdefault(layer, set()).add(part)
    specs = {}
    for name in names:
        if is_excluded(name, config.modules_to_not_convert or ()):
            raise CheckpointError(
                f"{reader.info(f'{name}.qweight').file}: {name} is quantized, but {CONFIG_FILE} "
                "lists it in modules_to_not_convert. Remove it there."
            )
        specs[name] = _check_layer(reader, config, name, parts[name])
    for layer, found in parts.items():
        if layer not in specs and {"scales", "offsets"} <= found:
            raise CheckpointError(
                f"{reader.directory}: {layer} has scales and offsets but no qweight. {_INCOMPLETE}"
            )
    return specs


def _check_layer(
    reader: CheckpointReader, config: QALoRAQuantConfig, name: str, found: set[str]
) -> QuantSpec:
    qweight = reader.info(f"{name}.qweight")
    if len(qweight.shape) != 2 or 0 in qweight.shape:
        raise CheckpointError(
            f"{qweight.file}: {qweight.name}: expected [rows, out_features], "
            f"found shape {qweight.shape}. The file is damaged: write or copy it again."
        )
    if "qzeros" in found:
        raise CheckpointError(
            f"{qweight.file}: {name} has packed qzeros: a stock GPTQ layer, but {CONFIG_FILE} "
            f"says quant_method {config.quant_method!r}. Restore the original {CONFIG_FILE}."
        )
    surplus = sorted(found - _LAYER_TENSORS)
    if "g_idx" in found and not config.desc_act:
        surplus.append("g_idx (desc_act is false)")
    if surplus:
        raise CheckpointError(
            f"{qweight.file}: {name} has tensors that its format does not: {', '.join(surplus)}. "
            f"{CONFIG_FILE} belongs to another checkpoint: restore the original one."
        )
    in_features = read_in_features(reader, name)
    spec = config.spec_for(name, in_features, qweight.shape[1])
    _check_bits(reader, name, spec)
    for tensor, (dtype, shape) in layer_header(name, spec, config.desc_act).items():
        if tensor not in reader:
            raise CheckpointError(f"{reader.directory}: {tensor} is missing. {_INCOMPLETE}")
        info = reader.info(tensor)
        if (info.dtype_name, info.shape) != (dtype, shape):
            raise CheckpointError(
                f"{info.file}: {tensor}: expected {_describe(dtype, shape)} for bits={spec.bits}, "
                f"group_size={spec.group_size}, in_features={in_features} ({CONFIG_FILE}), found "
                f"{_describe(info.dtype_name, info.shape)}. {CONFIG_FILE} contradicts the tensors: "
                "restore the original one, or write the checkpoint again."
            )
    return spec


def _check_bits(reader: CheckpointReader, name: str, spec: QuantSpec) -> None:
    info = reader.info(f"{name}.qweight")
    if info.shape[0] == spec.packed_rows:
        return
    bits, rest = divmod(info.shape[0], -(-spec.in_features // 32))
    fits = f" {info.shape[0]} rows fit bits={bits}." if not rest and bits in SUPPORTED_BITS else ""
    raise CheckpointError(
        f"{info.file}: {info.name}: expected {spec.packed_rows} rows for bits={spec.bits} "
        f"({CONFIG_FILE}) and in_features={spec.in_features}, found {info.shape[0]}.{fits} "
        f"{CONFIG_FILE} contradicts the tensors: correct its bits, or write the checkpoint again."
    )


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def bad_values(scales: "torch.Tensor", offsets: "torch.Tensor") -> str | None:
    """Say what is wrong with a layer's numbers, as "scales: expected ..., found ...", or None.

    Args:
        scales: [G, N], which have to be finite; they may be negative (MLX) and zero (GGUF).
        offsets: [G, N], which have to be finite.
    """
    for name, tensor in (("scales", scales), ("offsets", offsets)):
        if not all_finite(tensor):
            wrong = f"{int((~tensor.isfinite()).sum())} of {tensor.numel()}"
            return f"{name}: expected finite numbers, found {wrong} that are not"
    return None


def check_values(where: str, weight: "PackedWeight") -> None:
    """Check a layer's numbers: a damaged file or a kernel's out-of-bounds read shows here.

    Args:
        where: file and layer, for the message.
        weight: the layer.

    Raises:
        CheckpointError: a scale or an offset is bad (see `bad_values`), or a group index is outside
            [0, G).
    """
    bad = bad_values(weight.scales, weight.offsets)
    if bad is not None:
        raise CheckpointError(f"{where}.{bad}. {_BAD_VALUES}")
    if weight.g_idx is None:
        return
    low, high = (int(value) for value in weight.g_idx.aminmax())
    last = weight.spec.num_groups - 1
    if low < 0 or high > last:
        raise CheckpointError(
            f"{where}.g_idx: expected group numbers from 0 to {last}, found {low} to {high}. "
            "The file is damaged: write or copy it again."
        )
