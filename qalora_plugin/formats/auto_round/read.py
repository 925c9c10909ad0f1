"""Read AutoRound checkpoints of integer weights as quantized bases.

auto-round 0.16 (`export/export_to_autoround/export.py`, `auto_round_extension/torch`) has these
packings of `packings`: its own stores zero-points as they are, "auto_gptq" one less, "auto_awq" is
AutoAWQ's. No input lies in another group than k // group_size.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec

from ...architecture.patterns import match_inside
from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError, ConfigError
from ...files.names import CONFIG_FILE
from ..packings import (
    ALONG_INPUTS,
    ALONG_INPUTS_V1,
    ALONG_OUTPUTS,
    AWQ_BITS,
    QUANTIZE_AGAIN,
    Packing,
    check_integers,
    integer_config,
    read_integers,
    scales_dtype,
)
from . import FORMAT

if TYPE_CHECKING:  # headers are checked without it
    import torch

    from qalora_kernels import PackedWeight

PACKINGS = {
    "auto_round": ALONG_INPUTS,
    "auto_round:gptqmodel": ALONG_INPUTS,
    "auto_round:auto_gptq": ALONG_INPUTS_V1,
    "auto_round:auto_awq": ALONG_OUTPUTS,
}


def _packing(raw: dict[str, Any], path: Path) -> Packing:
    """Return how the layers are packed.

    Raises:
        CheckpointError: their weights are no integers, or packed in a way that is not read.
    """
    name = raw.get("packing_format") or raw.get("backend") or "auto_round:auto_gptq"
    kind, activations = str(raw.get("data_type", "int")), raw.get("act_bits") or 16
    fits = name in PACKINGS and (raw.get("bits") == AWQ_BITS or not PACKINGS[name].along_outputs)
    if not fits or not kind.startswith("int") or activations < 16:
        raise CheckpointError(
            f"{path}: AutoRound's {raw.get('bits')}-bit weights of type {kind!r} in packing_format "
            f"{name!r}, with activations of {activations} bits, are not read; expected 'int' in "
            f"one of {', '.join(PACKINGS)} (the last with {AWQ_BITS} bits), with activations of 16 "
            f"bits. {QUANTIZE_AGAIN}"
        )
    return PACKINGS[name]


def parse_config(raw: dict[str, Any], path: Path) -> QALoRAQuantConfig:
    """Return our config of a base, from its `quantization_config` alone.

    Raises:
        CheckpointError: it names a packing or an option that is not read.
    """
    _packing(raw, path)
    bits: Any = raw.get("bits")
    group_size: Any = raw.get("group_size", 128)
    return integer_config(bits, group_size, path)


class AutoRoundCheckpoint(QuantizedCheckpoint):
    """An AutoRound checkpoint as a quantized base; offsets are held in fp32, exactly."""

    format = FORMAT.name
    foreign_parts = ("qzeros",)

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        raw, path = self.reader.config["quantization_config"], self.directory / CONFIG_FILE
        config, self._packed = parse_config(raw, path), _packing(raw, path)
        config.scales_dtype = scales_dtype(self.reader)
        overrides = raw.get("extra_config") or {}

        def grid_of(name: str) -> tuple[int, int]:
            own: dict[str, Any] = overrides.get(name) or next(
                (values for key, values in overrides.items() if match_inside(key, name)), {}
            )
            bits, group_size = (
                own.get("bits", config.bits),
                own.get("group_size", config.group_size),
            )
            try:
                QALoRAQuantConfig(bits, group_size)
            except ConfigError as error:
                raise CheckpointError(f"{path}: extra_config: {name}: {error}") from error
            return bits, group_size

        layers = check_integers(self, self._packed, grid_of)
        usual = (config.bits, config.group_size)
        grids = {name: grid_of(name) for name in layers}
        config.dynamic = {
            name: {"bits": bits, "group_size": group_size}
            for name, (bits, group_size) in grids.items()
            if (bits, group_size) != usual
        }
        packing = raw.get("packing_format") or raw.get("backend")
        self.facts = {"packing_format": packing, "sym": raw.get("sym")}
        config.base = {"name_or_path": self.directory.name, "format": self.format, **self.facts}
        return config, layers

    def qweight(self, name: str) -> "torch.Tensor":
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        return self._packed.qweight(self.reader.get(f"{name}.qweight"), self.layers[name])

    def _read_layer(self, name: str) -> "PackedWeight":
        return read_integers(self, self._packed, name)


open_checkpoint = AutoRoundCheckpoint
