"""What the stock GPTQ format can hold, checked before anything is written."""

from collections.abc import Iterable, Mapping

from qalora_kernels import QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...checkpoint.layout import expert_place
from ...errors import CheckpointError, ConfigError, QALoRAError
from . import FORMAT

VERSIONS = ("gptq", "gptq_v2")
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
"""What GPTQModel 5.8 loads (`SUPPORTS_GROUP_SIZE` of its TorchQuantLinear)."""


def has_head(layers: Iterable[str]) -> bool:
    """Say whether the output head is among the quantized layers."""
    return any(name.rpartition(".")[2] == "lm_head" for name in layers)


def check_specs(specs: Mapping[str, QuantSpec], version: str, config: QALoRAQuantConfig) -> None:
    """Refuse what `check_writable` or GPTQModel would refuse, before anything is quantized.

    Raises:
        ConfigError: an override with "gptq", a group size, a layer's sizes, or an expert.
    """
    expert = next((name for name in specs if expert_place(name)), None)
    if expert is not None:
        raise ConfigError(
            f"{expert} is part of a mixture of experts, which format {FORMAT.name!r} is not "
            "written for: use format 'qalora'"
        )
    for size in (config.group_size, *(o.get("group_size", -1) for o in config.dynamic.values())):
        if size not in GPTQMODEL_GROUP_SIZES:
            raise ConfigError(
                f"group_size {size}: GPTQModel loads stock checkpoints with one of "
                f"{list(GPTQMODEL_GROUP_SIZES)} only. Choose one of these, or use format 'qalora'"
            )
    _check_shapes("", specs, version, config, ConfigError)


def check_writable(source: QuantizedCheckpoint, version: str = "gptq") -> bool:
    """Check every layer of a quantized model; return whether all zero-points are the middle code.

    Raises:
        ConfigError: layers of different widths, or a quantized head, with "gptq".
        CheckpointError: a layer's sizes, or a zero-point that is not an integer in range.
    """
    _check_shapes(f"{source.directory}: ", source.layers, version, source.config, CheckpointError)
    from ..zero_points import integer_zeros

    symmetric = True
    for name, spec in source.layers.items():
        where = f"{source.directory}: {name}"
        zeros = integer_zeros(where, source.layer(name), FORMAT)
        if version == "gptq" and not zeros.all():
            raise CheckpointError(
                f"{where}: has zero-points of 0, which v1 stores as -1 and its readers decode "
                "differently. Write checkpoint_format 'gptq_v2' for GPTQModel."
            )
        symmetric = symmetric and bool((zeros == spec.mid).all())
    return symmetric


def _check_shapes(
    where: str,
    specs: Mapping[str, QuantSpec],
    version: str,
    config: QALoRAQuantConfig,
    error: type[QALoRAError],
) -> None:
    if config.dynamic and version == "gptq":
        raise ConfigError(
            f"{where}layers differ in bits or group_size (dynamic), and the format 'gptq' has one "
            "grid for all layers, as AutoGPTQ reads it. Leave out dynamic, or write 'gptq_v2' for "
            "GPTQModel"
        )
    if has_head(specs) and version == "gptq":
        raise ConfigError(
            f"{where}its lm_head is quantized, which AutoGPTQ would run without its numbers. Write "
            "checkpoint_format 'gptq_v2', for GPTQModel"
        )
    for name, spec in specs.items():
        if spec.in_features % 32 or spec.out_features % 32:
            raise error(
                f"{where}{name} has {spec.in_features} inputs and {spec.out_features} outputs; "
                "stock GPTQ needs multiples of 32. Quantize with it in modules_to_not_convert, or "
                "choose another format"
            )
