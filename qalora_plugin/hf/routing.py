"""Let `from_pretrained` hand stock GPTQ directories to our quantizer.

transformers gives a directory to the quantizer that its config.json names: for "gptq" that is
GPTQModel's, which is refused where GPTQModel is not installed, and a `quantization_config` of
another class is refused before any quantizer is asked. Its one decision point is replaced by one
that asks us first.
"""

import functools
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import is_gptqmodel_available, is_optimum_available

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import foreign_config
from ..errors import ConfigError
from ..files.names import CONFIG_FILE

_INSTALLED = "_qalora_original"


def check_request(
    requested: QALoRAQuantConfig, stored: QALoRAQuantConfig, where: str = CONFIG_FILE
) -> None:
    """Refuse to load the quantized directory `where` as something that it is not.

    Raises:
        ConfigError: bits or group_size differ, or minima are asked for and not there.
    """
    for key in ("bits", "group_size", "offsets_at"):
        wanted, found = getattr(requested, key), getattr(stored, key)
        if wanted != found and (key, wanted) != ("offsets_at", "middle"):  # the default: not asked
            raise ConfigError(
                f"{where}: is quantized with {key}={found}, but quantization_config asks for "
                f"{key}={wanted}. Leave quantization_config out, or quantize the 16-bit model."
            )


def merge_configs(stored: Any, requested: Any) -> QALoRAQuantConfig | None:
    """Return the config to load a directory with, None to leave the decision to transformers.

    Args:
        stored: `quantization_config` of config.json, as a dict or an object.
        requested: that given to from_pretrained, or None.

    Raises:
        ConfigError: the two contradict each other.
        CheckpointError: a stock GPTQ config that is not supported.
    """
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    ours = isinstance(requested, QALoRAQuantConfig)
    config = None
    gptqmodel_loads = is_gptqmodel_available() and is_optimum_available()
    if ours and stored.get("quant_method") == QUANT_METHOD:
        config = QALoRAQuantConfig(**stored)
    elif ours or (requested is None and not gptqmodel_loads):
        config = foreign_config(stored, Path(CONFIG_FILE))
    if ours and config is not None:
        check_request(requested, config)
    return config


def install() -> None:
    """Wrap `AutoHfQuantizer.merge_quantization_configs`; a second call does nothing."""
    original = AutoHfQuantizer.merge_quantization_configs
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def merge_quantization_configs(stored: Any, requested: Any) -> Any:
        config = merge_configs(stored, requested)
        return original(stored, requested) if config is None else config

    setattr(merge_quantization_configs, _INSTALLED, original)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
