"""Read stock GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum) as quantized bases.

Per layer: qweight int32 [K/32*bits, N], qzeros int32 [G, N/32*bits] (integer zero-points z packed
along N), scales [G, N], g_idx int32 [K] (always there), bias. Then

    W[n, k] = scales[g, n] * (q[n, k] - z[g, n]) = scales * (q - mid) + offsets
    offsets = scales * (mid - z)                  exact in fp32: 11 bits of fp16 times at most 9

`checkpoint_format: gptq` (v1) stores z - 1, `gptq_v2` stores z. How v1's borrow was handled
depends on who wrote the file, see `_zero_points`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec

from ...architecture.patterns import match_start
from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError, ConfigError
from ...files.json import read_json
from ...files.names import CONFIG_FILE, QUANTIZE_CONFIG_FILE
from ..packings import QUANTIZE_AGAIN, scales_dtype
from .limits import VERSIONS

if TYPE_CHECKING:  # headers are checked without it
    import torch

    from qalora_kernels import PackedWeight

_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_OVERRIDES = {"bits", "group_size", "desc_act", "sym"}
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
    """The part of a stock checkpoint's quantization config that matters for reading it.

    Args:
        bits, group_size: of layers without an override.
        desc_act, sym: as declared; the tensors decide.
        checkpoint_format: "gptq" (v1) or "gptq_v2".
        producer: the program that wrote the files, such as "gptqmodel:5.8.0", or "".
        dynamic: GPTQModel's overrides, {regular expression: {...}}; "-:" marks exclusions.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: str
    producer: str
    dynamic: dict[str, Any]

    def as_ours(self, **more: Any) -> QALoRAQuantConfig:
        """Return our config of the checkpoint, with more fields of it."""
        return QALoRAQuantConfig(
            self.bits, self.group_size, offsets_dtype="float32", method="gptq", **more
        )

    def spec_for(
        self, name: str, in_features: int, out_features: int, scales_dtype: str
    ) -> QuantSpec:
        """Return the grid of one layer, with GPTQModel's override if one matches its name."""
        bits, group_size = self.bits, self.group_size
        for pattern, override in self.dynamic.items():
            if not pattern.startswith("-:") and match_start(pattern.removeprefix("+:"), name):
                bits = override.get("bits", bits)
                group_size = override.get("group_size", group_size)
                break
        return QuantSpec(bits, group_size, in_features, out_features, "float32", scales_dtype)


def _parse(raw: dict[str, Any], path: Path) -> StockConfig:
    """Check `quantization_config` of config.json, or quantize_config.json, at `path`."""
    # AutoGPTQ and GPTQModel write checkpoint_format, later GPTQModel and optimum also format
    checkpoint_format = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if checkpoint_format not in VERSIONS:
        raise CheckpointError(
            f"{path}: checkpoint_format {checkpoint_format!r} is not read; expected 'gptq' or "
            "'gptq_v2'. Convert the checkpoint with GPTQModel, or quantize the 16-bit model again."
        )
    bits: Any = raw.get("bits")
    group_size: Any = raw.get("group_size", 128)
    _check_grid(f"{path}: ", bits, group_size)
    pack_dtype = raw.get("pack_dtype") or "int32"
    if pack_dtype != "int32":
        raise CheckpointError(
            f"{path}: pack_dtype {pack_dtype!r} is not read; expected 'int32'. {QUANTIZE_AGAIN}"
        )
    meta = raw.get("meta") or {}
    quantizer = meta.get("quantizer", "") if isinstance(meta, dict) else ""
    names = list(map(str, quantizer)) if isinstance(quantizer, list) else [str(quantizer)]
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise CheckpointError(
            f"{path}: dynamic: expected an object, found {dynamic!r}. {QUANTIZE_AGAIN}"
        )
    for pattern, override in dynamic.items():
        _check_override(f"{path}: dynamic[{pattern!r}]: ", pattern, override, bits, group_size)
    return StockConfig(
        bits=bits,
        group_size=group_size,
        desc_act=bool(raw.get("desc_act", False)),
        sym=bool(raw.get("sym", True)),
        checkpoint_format=checkpoint_format,
        producer=next((name for name in names if "gptqmodel" in name.lower()), names[0]),
        dynamic=dynamic,
    )


def _check_grid(where: str, bits: Any, group_size: Any) -> None:
    try:
        QALoRAQuantConfig(bits, group_size)
    except ConfigError as error:
        why = str(error).removeprefix("quantization_config: ")
        raise CheckpointError(f"{where}{why}. {QUANTIZE_AGAIN}") from error


def _check_override(where: str, pattern: str, override: Any, bits: int, group_size: int) -> None:
    try:
        re.compile(pattern.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise CheckpointError(f"{where}not a regular expression ({error}). Correct it.") from error
    if pattern.startswith("-:"):
        return
    if not isinstance(override, dict) or set(override) - _OVERRIDES:
        raise CheckpointError(
            f"{where}expected some of {sorted(_OVERRIDES)}, found {override!r}. {QUANTIZE_AGAIN}"
        )
    _check_grid(where, override.get("bits", bits), override.get("group_size", group_size))


def parse_config(raw: dict[str, Any], path: Path) -> QALoRAQuantConfig:
    """Return our config of a stock base, from its `quantization_config` alone.

    Raises:
        CheckpointError: it names a format or an option that is not read.
    """
    stock = _parse(raw, path)
    return stock.as_ours(desc_act=stock.desc_act)


class GPTQCheckpoint(QuantizedCheckpoint):
    """A stock GPTQ checkpoint as a quantized base; offsets are held in fp32, where they are exact.

    Attributes:
        stock: its own config.
    """

    format = "gptq"
    foreign_parts = ("qzeros",)
    stock: StockConfig

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        path = self.directory / CONFIG_FILE
        raw = self.reader.config.get("quantization_config")
        if raw is None:  # then there is AutoGPTQ's own file
            path = self.directory / QUANTIZE_CONFIG_FILE
            raw = read_json(path)
        self.stock = stock = _parse(raw, path)
        self.facts = {"checkpoint_format": stock.checkpoint_format, "sym": stock.sym}
        names = [n.removesuffix(".qweight") for n in self.reader.tensors if n.endswith(".qweight")]
        if not names:
            raise CheckpointError(
                f"{self.directory}: no qweight: not a GPTQ checkpoint. The weights belong to "
                "another one: copy config and weights from one."
            )
        dtype = scales_dtype(self.reader)
        layers = {name: self._check_layer(name, dtype) for name in names}
        dynamic = {
            name: {"bits": spec.bits, "group_size": spec.group_size}
            for name, spec in layers.items()
            if (spec.bits, spec.group_size)
            != (stock.bits, spec.in_features if stock.group_size == -1 else stock.group_size)
        }
        base = {
            "name_or_path": self.directory.name,
            "format": stock.checkpoint_format,
            "sym": stock.sym,
            "producer": stock.producer,
        }
        desc_act = self._has_act_order(layers)
        config = stock.as_ours(desc_act=desc_act, dynamic=dynamic, base=base, scales_dtype=dtype)
        return config, layers

    def _check_layer(self, name: str, dtype: str) -> QuantSpec:
        """Check a layer's tensors against the config, from the headers, and return its grid."""
        for part in _TENSORS:
            if f"{name}.{part}" not in self.reader:
                raise CheckpointError(
                    f"{self.directory}: {name}.{part} is missing: not a whole stock GPTQ layer. "
                    "Download or copy the checkpoint again."
                )
        qweight, qzeros, scales, g_idx = (self.reader.info(f"{name}.{part}") for part in _TENSORS)
        if len(qweight.shape) != 2 or len(g_idx.shape) != 1:
            raise CheckpointError(
                f"{qweight.file}: {name}: expected qweight [rows, out_features] and g_idx "
                f"[in_features], found shapes {qweight.shape} and {g_idx.shape}. {QUANTIZE_AGAIN}"
            )
        spec = self.stock.spec_for(name, g_idx.shape[0], qweight.shape[1], dtype)
        expected = {
            qweight: (spec.packed_rows, spec.out_features),
            qzeros: (spec.num_groups, -(-spec.out_features * spec.bits // 32)),
            scales: (spec.num_groups, spec.out_features),
        }
        for info, shape in expected.items():
            if info.shape != shape:
                raise CheckpointError(
                    f"{info.file}: {info.name}: expected shape {list(shape)} for bits={spec.bits}, "
                    f"group_size={spec.group_size}, in_features={spec.in_features}, found "
                    f"{list(info.shape)}. The config contradicts the tensors, or the layer was cut "
                    f"off by a quantizer that needs multiples of 32. {QUANTIZE_AGAIN}"
                )
        for info in (qweight, qzeros, scales, g_idx):
            wanted = "floats" if info is scales else "int32"
            fits = info.is_float if info is scales else info.dtype_name == "int32"
            if not fits:
                raise CheckpointError(
                    f"{info.file}: {info.name}: expected {wanted}, found {info.dtype_name}. "
                    f"{QUANTIZE_AGAIN}"
                )
        return spec

    def _has_act_order(self, layers: dict[str, QuantSpec]) -> bool:
        """Say whether any layer's groups are not k // group_size, whatever the config declares."""
        import numpy as np

        for name, spec in layers.items():
            g_idx = self.reader.integers(f"{name}.g_idx")
            if not np.array_equal(g_idx, np.arange(len(g_idx)) // spec.group_size):
                return True
        return False

    def _read_layer(self, name: str) -> "PackedWeight":
        from ..zero_points import layer_of_zeros

        spec = self.layers[name]
        zeros = _zero_points(self.reader.get(f"{name}.qzeros"), spec, self.stock)
        g_idx = self.reader.get(f"{name}.g_idx") if self.config.desc_act else None
        scales = self.reader.get(f"{name}.scales")
        where = f"{self.where(name)}.scales"
        return layer_of_zeros(where, spec, self.qweight(name), scales, zeros, g_idx)


def _zero_points(qzeros: "torch.Tensor", spec: QuantSpec, stock: StockConfig) -> "torch.Tensor":
    """Return the integer zero-points z, int32 [G, N], from packed `qzeros`; v1 stores z - 1.

    AutoGPTQ adds 1 to each unpacked value, modulo 2^bits. GPTQModel adds to whole words, so that a
    z of 0, whose 1 was borrowed from its neighbour when it was written, comes back right.
    """
    import torch

    from qalora_kernels.packing import unpack_columns

    bits, add = spec.bits, int(stock.checkpoint_format == "gptq")
    name, _, version = stock.producer.partition(":")
    major = re.match(r"\d+", version)
    older_than_7 = major is None or int(major.group()) < 7
    if add and "gptqmodel" in name.lower() and (bits != 3 or older_than_7):
        ones = torch.tensor(sum(1 << shift for shift in range(0, 32, bits)))
        if bits == 3:
            ones = torch.tensor(_OLD_GPTQMODEL_3BIT).repeat(-(-qzeros.shape[1] // 3))
            ones = ones[: qzeros.shape[1]]
        qzeros = (qzeros.to(torch.int64) + ones).to(torch.int32)  # drops a carry out of the word
        add = 0
    stored = unpack_columns(qzeros, bits, spec.out_features).to(torch.int32)
    return (stored + add) & ((1 << bits) - 1)


open_checkpoint = GPTQCheckpoint
