"""Read stock GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum) as quantized bases.

Per layer: qweight int32 [K/32*bits, N], qzeros int32 [G, N/32*bits] (integer zero-points z packed
along N), scales [G, N], g_idx int32 [K] (always there), bias. Then

    W[n, k] = scales[g, n] * (q[n, k] - z[g, n]) = scales * (q - mid) + offsets
    offsets = scales * (mid - z)                  exact in fp32: 11 bits of fp16 times at most 9

`checkpoint_format: gptq` (v1) stores z - 1, `gptq_v2` stores z. How v1's borrow was handled
depends on who wrote the file, see `_v1_zeros`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import SUPPORTED_BITS, QuantSpec
from qalora_kernels.packing import unpack_columns

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError
from ...files.json import read_json
from ...files.names import CONFIG_FILE, QUANTIZE_CONFIG_FILE
from ...files.reader import CheckpointReader

STOCK_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_DYNAMIC_KEYS = {"bits", "group_size", "desc_act", "sym"}
_QUANTIZE_AGAIN = "Quantize the 16-bit model again with `qalora quantize`."
# What GPTQModel before 7.0 adds to the three words of 32 packed 3-bit zero-points to come from v1
# to v2 (and subtracts on the way back): the right constants, but for words in reverse order
# (corrected by https://github.com/ModelCloud/GPTQModel/pull/2763).
_OLD_GPTQMODEL_3BIT = (
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
)


@dataclass(frozen=True)
class StockConfig:
    """What a stock checkpoint's quantization config says that matters for reading it.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: inputs a group, or -1.
        desc_act: as declared; the g_idx tensors decide.
        sym: as declared; the qzeros tensors decide.
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        producer: the program that wrote the files, such as "gptqmodel:5.8.0", or "".
        dynamic: GPTQModel's overrides, {regular expression: {...}}; "-:" marks exclusions.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: str
    producer: str = ""
    dynamic: dict[str, Any] = field(default_factory=dict)

    def spec_for(self, name: str, in_features: int, out_features: int) -> QuantSpec:
        """The grid of one layer, with GPTQModel's override if one matches its name."""
        bits, group_size = self.bits, self.group_size
        for pattern, override in self.dynamic.items():
            if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
                bits = override.get("bits", bits)
                group_size = override.get("group_size", group_size)
                break
        return QuantSpec(bits, group_size, in_features, out_features, torch.float32)


def is_stock_gptq(quantization_config: Any) -> bool:
    """Whether a config.json's `quantization_config` is that of a stock GPTQ checkpoint."""
    return (
        isinstance(quantization_config, dict) and quantization_config.get("quant_method") == "gptq"
    )


def read_stock_config(directory: str | Path) -> StockConfig:
    """Read config.json's `quantization_config`, or quantize_config.json where there is none.

    Raises:
        CheckpointError: neither is there, or it names a format or an option that is not read.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    raw = read_json(path).get("quantization_config")
    if raw is None:
        path = directory / QUANTIZE_CONFIG_FILE
        if not path.exists():
            raise CheckpointError(
                f"{directory}: no quantization_config in {CONFIG_FILE} and no "
                f"{QUANTIZE_CONFIG_FILE}: not a GPTQ checkpoint."
            )
        raw = {"quant_method": "gptq", **read_json(path)}
    return parse_stock_config(raw, path)


def parse_stock_config(raw: Any, path: Path) -> StockConfig:
    """Check a stock quantization config. `path` is for messages.

    Raises:
        CheckpointError: it is not GPTQ, or names a format or an option that is not read.
    """
    if not is_stock_gptq(raw):
        raise CheckpointError(
            f"{path}: expected quant_method 'gptq', found {raw!r}. {_QUANTIZE_AGAIN}"
        )
    # AutoGPTQ and GPTQModel write checkpoint_format, later GPTQModel and optimum also format
    checkpoint_format = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if checkpoint_format not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{path}: checkpoint_format {checkpoint_format!r} is not read; expected 'gptq' or "
            "'gptq_v2'. Convert the checkpoint with GPTQModel, or quantize the 16-bit model again."
        )
    bits, group_size = raw.get("bits"), raw.get("group_size", 128)
    _check_grid(path, "", bits, group_size)
    pack_dtype = raw.get("pack_dtype") or "int32"
    if pack_dtype != "int32":
        raise CheckpointError(
            f"{path}: pack_dtype {pack_dtype!r} is not read; expected 'int32'. {_QUANTIZE_AGAIN}"
        )
    meta = raw.get("meta") or {}
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    dynamic = raw.get("dynamic") or {}
    _check_dynamic(path, dynamic, bits, group_size)
    return StockConfig(
        bits=bits,
        group_size=group_size,
        desc_act=bool(raw.get("desc_act", False)),
        sym=bool(raw.get("sym", True)),
        checkpoint_format=checkpoint_format,
        producer=next((str(n) for n in names if "gptqmodel" in str(n).lower()), str(names[0])),
        dynamic=dynamic,
    )


def _check_grid(path: Path, where: str, bits: Any, group_size: Any) -> None:
    if bits not in SUPPORTED_BITS:
        raise CheckpointError(
            f"{path}: {where}bits: expected one of {SUPPORTED_BITS}, found {bits!r}. "
            f"{_QUANTIZE_AGAIN}"
        )
    if not isinstance(group_size, int) or (group_size != -1 and group_size < 1):
        raise CheckpointError(
            f"{path}: {where}group_size: expected a positive number or -1, found {group_size!r}. "
            f"{_QUANTIZE_AGAIN}"
        )


def _check_dynamic(path: Path, dynamic: Any, bits: Any, group_size: Any) -> None:
    if not isinstance(dynamic, dict):
        raise CheckpointError(
            f"{path}: dynamic: expected an object, found {dynamic!r}. {_QUANTIZE_AGAIN}"
        )
    for pattern, override in dynamic.items():
        where = f"dynamic[{pattern!r}]: "
        try:
            re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise CheckpointError(
                f"{path}: {where}not a regular expression ({error}). Correct it."
            ) from error
        if pattern.startswith("-:"):
            continue
        if not isinstance(override, dict) or set(override) - _DYNAMIC_KEYS:
            raise CheckpointError(
                f"{path}: {where}expected some of {sorted(_DYNAMIC_KEYS)}, found {override!r}. "
                f"{_QUANTIZE_AGAIN}"
            )
        _check_grid(path, where, override.get("bits", bits), override.get("group_size", group_size))


def check_stock_layers(reader: CheckpointReader, stock: StockConfig) -> dict[str, QuantSpec]:
    """Check every quantized layer's tensors against the config, from the headers.

    Returns:
        The grid of every quantized layer by name; offsets are held in fp32.

    Raises:
        CheckpointError: no quantized layer, or one whose tensors are missing or do not fit.
    """
    names = [name.removesuffix(".qweight") for name in reader.tensors if name.endswith(".qweight")]
    if not names:
        raise CheckpointError(
            f"{reader.directory}: no qweight: not a GPTQ checkpoint. The weights belong to another "
            "one: copy config and weights from one."
        )
    return {name: _check_stock_layer(reader, stock, name) for name in names}


def _check_stock_layer(reader: CheckpointReader, stock: StockConfig, name: str) -> QuantSpec:
    for part in STOCK_TENSORS:
        if f"{name}.{part}" not in reader:
            raise CheckpointError(
                f"{reader.directory}: {name}.{part} is missing: not a whole stock GPTQ layer. "
                "Download or copy the checkpoint again."
            )
    qweight, qzeros, scales, g_idx = (reader.info(f"{name}.{part}") for part in STOCK_TENSORS)
    if len(qweight.shape) != 2 or len(g_idx.shape) != 1:
        raise CheckpointError(
            f"{qweight.file}: {name}: expected qweight [rows, out_features] and g_idx "
            f"[in_features], found shapes {qweight.shape} and {g_idx.shape}. {_QUANTIZE_AGAIN}"
        )
    spec = stock.spec_for(name, g_idx.shape[0], qweight.shape[1])
    words = -(-spec.out_features * spec.bits // 32)
    expected = {
        qweight: (spec.packed_rows, spec.out_features),
        qzeros: (spec.num_groups, words),
        scales: (spec.num_groups, spec.out_features),
    }
    for info, shape in expected.items():
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: {info.name}: expected shape {list(shape)} for bits={spec.bits}, "
                f"group_size={spec.group_size}, in_features={spec.in_features}, found "
                f"{list(info.shape)}. The config contradicts the tensors, or the layer was cut off "
                f"by a quantizer that needs multiples of 32. {_QUANTIZE_AGAIN}"
            )
    for info in (qweight, qzeros, g_idx):
        if info.dtype != torch.int32:
            raise CheckpointError(
                f"{info.file}: {info.name}: expected int32, found {info.dtype}. {_QUANTIZE_AGAIN}"
            )
    if not scales.dtype.is_floating_point:
        raise CheckpointError(
            f"{scales.file}: {scales.name}: expected floats, found {scales.dtype}. "
            f"{_QUANTIZE_AGAIN}"
        )
    return spec


def follows_order(g_idx: torch.Tensor, group_size: int) -> bool:
    """Whether `g_idx` [K] is just k // group_size, so that it need not be kept."""
    return torch.equal(g_idx, torch.arange(len(g_idx), dtype=g_idx.dtype) // group_size)


def has_act_order(reader: CheckpointReader, specs: dict[str, QuantSpec]) -> bool:
    """Whether any layer's groups are not k // group_size, whatever the config declares."""
    return not all(
        follows_order(reader.get(f"{name}.g_idx"), spec.group_size) for name, spec in specs.items()
    )


def zero_points(qzeros: torch.Tensor, spec: QuantSpec, stock: StockConfig) -> torch.Tensor:
    """Integer zero-points z, int32 [G, N], from packed `qzeros`."""
    if stock.checkpoint_format == "gptq_v2":
        return unpack_columns(qzeros, spec.bits, spec.out_features).to(torch.int32)
    return _v1_zeros(qzeros, spec, stock)


def _v1_zeros(qzeros: torch.Tensor, spec: QuantSpec, stock: StockConfig) -> torch.Tensor:
    """Z from the stored z - 1.

    AutoGPTQ adds 1 to each unpacked value, modulo 2^bits. GPTQModel adds to whole words, so that a
    z of 0, whose 1 was borrowed from its neighbour when it was written, comes back right.
    """
    bits, columns = spec.bits, spec.out_features
    name, _, version = stock.producer.partition(":")
    if "gptqmodel" not in name.lower():
        stored = unpack_columns(qzeros, bits, columns).to(torch.int32)
        return (stored + 1) & ((1 << bits) - 1)
    if bits == 3:
        if not _older_than_7(version):
            stored = unpack_columns(qzeros, bits, columns).to(torch.int32)
            return (stored + 1) & 7
        ones = torch.tensor(_OLD_GPTQMODEL_3BIT).repeat(-(-qzeros.shape[1] // 3))
        ones = ones[: qzeros.shape[1]]
    else:
        ones = torch.tensor(sum(1 << shift for shift in range(0, 32, bits)))
    words = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return unpack_columns(words, bits, columns).to(torch.int32)


def _older_than_7(version: str) -> bool:
    match = re.match(r"\d+", version)
    return match is None or int(match.group()) < 7


def scales_and_offsets(
    where: str, qzeros: torch.Tensor, scales: torch.Tensor, spec: QuantSpec, stock: StockConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """A stock layer's scales and offsets in our terms, fp32 [G, N], both exact.

    Args:
        where: file and layer, for the message.
        qzeros: int32 [G, words].
        scales: [G, N], any float dtype.

    Raises:
        CheckpointError: a scale that fp16, in which our format stores scales, does not hold.
    """
    stored = scales.to(spec.scales_dtype).float()
    if not torch.equal(stored, scales.float()):
        raise CheckpointError(
            f"{where}.scales: {scales.dtype} values that float16 does not hold exactly. "
            f"{_QUANTIZE_AGAIN}"
        )
    return stored, stored * (spec.mid - zero_points(qzeros, spec, stock)).float()


def to_qalora_config(
    stock: StockConfig, specs: dict[str, QuantSpec], desc_act: bool, source: str
) -> QALoRAQuantConfig:
    """Our quantization config for a stock base.

    Args:
        stock: its own config.
        specs: the grid of every quantized layer.
        desc_act: whether g_idx is kept (`has_act_order`).
        source: name of the base, for the record.
    """
    dynamic = {}
    for name, spec in specs.items():
        if stock.dynamic and spec != QuantSpec(
            stock.bits, stock.group_size, spec.in_features, spec.out_features, torch.float32
        ):
            dynamic[name] = {"bits": spec.bits, "group_size": spec.group_size}
    return QALoRAQuantConfig(
        bits=stock.bits,
        group_size=stock.group_size,
        desc_act=desc_act,
        offsets_dtype="float32",
        dynamic=dynamic,
        method="gptq",
        base={
            "name_or_path": source,
            "format": stock.checkpoint_format,
            "sym": stock.sym,
            "producer": stock.producer,
        },
    )


def parse_config(raw: Any, path: Path) -> QALoRAQuantConfig:
    """Return our config of a stock base, from its `quantization_config` alone.

    Raises:
        CheckpointError: see `parse_stock_config`.
    """
    stock = parse_stock_config(raw, path)
    return QALoRAQuantConfig(
        stock.bits, stock.group_size, stock.desc_act, offsets_dtype="float32", method="gptq"
    )


class GPTQCheckpoint(QuantizedCheckpoint):
    """A stock GPTQ checkpoint as a quantized base; offsets are held in fp32, where they are exact.

    Attributes:
        stock: its own config.
    """

    format = "gptq"
    foreign_parts = ("qzeros",)
    stock: StockConfig

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        self.stock = read_stock_config(self.directory)
        self.facts = {
            "checkpoint_format": self.stock.checkpoint_format,
            "sym": self.stock.sym,
        }
        layers = check_stock_layers(self.reader, self.stock)
        act_order = has_act_order(self.reader, layers)
        return to_qalora_config(self.stock, layers, act_order, self.directory.name), layers

    def _grid(self, name: str, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
        qzeros, scales = self.reader.get(f"{name}.qzeros"), self.reader.get(f"{name}.scales")
        return scales_and_offsets(self.where(name), qzeros, scales, spec, self.stock)


open_checkpoint = GPTQCheckpoint
