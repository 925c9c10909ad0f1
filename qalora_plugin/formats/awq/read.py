"""Read AutoAWQ checkpoints of version gemm as quantized bases; the layout is that of `packings`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError
from ...files.names import CONFIG_FILE
from ..packings import (
    ALONG_OUTPUTS,
    AWQ_BITS,
    QUANTIZE_AGAIN,
    check_integers,
    integer_config,
    read_integers,
    scales_dtype,
)
from . import FORMAT

if TYPE_CHECKING:  # headers are checked without it
    import torch

    from qalora_kernels import PackedWeight


def parse_config(raw: dict[str, Any], path: Path) -> QALoRAQuantConfig:
    """Return our config of a base, from its `quantization_config` alone.

    Raises:
        CheckpointError: it names a version or an option that is not read.
    """
    # AutoAWQ's own quant_config.json says w_bit and q_group_size
    bits: Any = raw.get("bits", raw.get("w_bit"))
    group_size: Any = raw.get("group_size", raw.get("q_group_size", 128))
    version = str(raw.get("version", "gemm")).lower()
    if version != "gemm" or bits != AWQ_BITS:
        raise CheckpointError(
            f"{path}: AWQ of {bits!r} bits in version {version!r} is not read; expected {AWQ_BITS} "
            f"bits in version 'gemm'. Convert it with AutoAWQ. {QUANTIZE_AGAIN}"
        )
    return integer_config(bits, group_size, path)


class AWQCheckpoint(QuantizedCheckpoint):
    """An AutoAWQ checkpoint as a quantized base; offsets are held in fp32, exactly."""

    format = FORMAT.name
    foreign_parts = ("qzeros",)

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        raw = self.reader.config["quantization_config"]
        config = parse_config(raw, self.directory / CONFIG_FILE)
        config.scales_dtype = scales_dtype(self.reader)
        config.base = {"name_or_path": self.directory.name, "format": self.format}
        grid = (config.bits, config.group_size)
        return config, check_integers(self, ALONG_OUTPUTS, lambda name: grid)

    def qweight(self, name: str) -> "torch.Tensor":
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        return ALONG_OUTPUTS.qweight(self.reader.get(f"{name}.qweight"), self.layers[name])

    def _read_layer(self, name: str) -> "PackedWeight":
        return read_integers(self, ALONG_OUTPUTS, name)


open_checkpoint = AWQCheckpoint
