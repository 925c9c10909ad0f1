"""What is quantized and how, checked before anything is written."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qalora_kernels import QuantSpec

from ..architecture.blocks import find_blocks
from ..architecture.selection import check_group_sizes, check_overrides, linears_to_quantize
from ..checkpoint.config import QALoRAQuantConfig
from ..errors import ConfigError
from .calibration import Calibration
from .source import ModelSource

FORMATS = ("qalora", "gptq", "gptq_v2")
DEFAULT_SEQ_LEN = 512


def choose_zero_points(format: str, zero_points: str | None) -> str:
    """ "real" or "integer".

    Raises:
        ConfigError: unknown, or the format holds integers only.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {FORMATS}, found {format!r}")
    if zero_points not in (None, "real", "integer"):
        raise ConfigError(f"zero_points must be 'real' or 'integer', found {zero_points!r}")
    if format != "qalora" and zero_points == "real":
        raise ConfigError(
            f"format {format!r} holds integer zero-points only: use zero_points 'integer', or "
            "format 'qalora'"
        )
    return zero_points or ("real" if format == "qalora" else "integer")


def check_data_free(calibration: Calibration | None, desc_act: bool) -> None:
    """Refuse what needs, or is, calibration data with a method that uses none.

    Raises:
        ConfigError: names it.
    """
    if desc_act:
        raise ConfigError("desc_act orders inputs by calibration data: it needs method 'gptq'")
    if calibration is not None:
        raise ConfigError(
            "calibration: method 'rtn' uses no data: leave it out, or use method 'gptq'"
        )


def usable_device(device: str | torch.device) -> torch.device:
    """The device, once a number has gone there and back.

    Raises:
        ConfigError: torch does not know it, was built without it, or sees none.
    """
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        raise ConfigError(
            f"device {str(device)!r} cannot be used: torch {torch.__version__} sees {gpus or 'no'} "
            f"GPU here. Use 'cpu'{' or ' + repr('cuda') if gpus else ''}"
        ) from error
    return found


def choose_layers(source: ModelSource, config: QALoRAQuantConfig) -> dict[str, QuantSpec]:
    """The grid of every layer to quantize, by its name in the model.

    Args:
        source: the model.
        config: of the quantization; its `modules_to_not_convert` becomes the list of the others.

    Raises:
        ConfigError: no layer, a group size that is larger than every layer, or an override that
            matches none.
    """
    model = source.model
    blocks_name, _ = find_blocks(model)
    linears = {
        name: linear
        for name, linear in linears_to_quantize(
            model, config.modules_to_not_convert, source.reader.tensors
        ).items()
        if name.startswith(blocks_name + ".")
    }
    specs = {
        name: config.spec_for(source.layer_name(name), linear.in_features, linear.out_features)
        for name, linear in linears.items()
    }
    check_group_sizes(config.group_sizes, linears.values())
    check_overrides(config.dynamic, [source.layer_name(name) for name in specs])
    config.modules_to_not_convert = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in specs
    ]
    return specs


def fitting_length(model_config: Any, seq_len: int | None) -> int:
    """Tokens in a calibration window.

    Raises:
        ConfigError: more than the model takes.
    """
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if seq_len is None:
        return min(DEFAULT_SEQ_LEN, limit or DEFAULT_SEQ_LEN)
    if limit is not None and seq_len > limit:
        raise ConfigError(
            f"seq_len {seq_len} is more than the {limit} tokens that the model takes "
            "(max_position_embeddings): give a smaller one, or leave it out"
        )
    return seq_len


def compute_dtype(model: PreTrainedModel, device: torch.device) -> torch.dtype:
    """Of the activations: the model's, but for fp16 on a CPU."""
    # few CPU operators exist in fp16, none is fast
    return torch.float32 if model.dtype == torch.float16 and device.type == "cpu" else model.dtype
