"""Let `from_pretrained` hand quantized directories of other programs to our quantizer.

transformers gives a directory to the quantizer that its config.json names: for "gptq" that is
GPTQModel's, which is refused where GPTQModel is not installed, and a `quantization_config` of
another class is refused before any quantizer is asked. Its one decision point is replaced by one
that asks us first.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import modeling_utils
from transformers.quantizers.auto import AutoHfQuantizer

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.config import QALoRAQuantConfig as StoredConfig
from ..checkpoint.format import foreign_config, formats, owners_of, unread_note
from ..errors import CheckpointError, ConfigError
from ..files.names import CONFIG_FILE
from .config import QALoRAQuantConfig

_INSTALLED = "_qalora_original"
_ASKED = ("offsets_at", "desc_act", "dynamic")


def check_request(
    requested: StoredConfig,
    stored: StoredConfig,
    where: str = CONFIG_FILE,
    asked: tuple[str, ...] = ("offsets_at",),
) -> None:
    """Refuse to load the quantized directory `where` as something that it is not.

    Args:
        requested: given to from_pretrained.
        stored: what the directory says.
        where: the directory.
        asked: keys, beside bits and group_size, that count unless they have their default.

    Raises:
        ConfigError: bits, group_size or one of `asked` differ.
    """
    default = StoredConfig()
    for key in ("bits", "group_size", *asked):
        wanted, found = getattr(requested, key), getattr(stored, key)
        if wanted != found and not (key in asked and wanted == getattr(default, key)):
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
        CheckpointError: a config of a format that can be a base, with an option that is not read.
    """
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    ours = isinstance(requested, QALoRAQuantConfig)
    config = None
    owners = owners_of(stored)
    stock_loads = bool(owners) and all(map(find_spec, owners))
    if ours and stored.get("quant_method") == QUANT_METHOD:
        config = QALoRAQuantConfig(**stored)
    elif ours or (requested is None and not stock_loads):
        foreign = foreign_config(stored, Path(CONFIG_FILE))
        config = None if foreign is None else QALoRAQuantConfig.of(foreign)
    if ours and config is not None:
        own = stored.get("quant_method") == QUANT_METHOD
        # of a foreign format the layers say the rest
        check_request(requested, config, asked=_ASKED if own else _ASKED[:1])
    return config


def name_unnamed(config: Any) -> None:
    """Have a config whose quantization names no method (MLX) name ours.

    transformers refuses the one that it finds in `quantization_config`, and overlooks the one under
    a key of its format's own, where older files have it alone.

    Raises:
        CheckpointError: the format is known, but names an option that is not read.
    """
    keys = ("quantization_config", *(f.config_key for f in formats() if f.unnamed_keys))
    for key in filter(None, keys):
        raw = getattr(config, key, None)
        if isinstance(raw, dict) and "quant_method" not in raw:
            found = foreign_config(raw, Path(CONFIG_FILE))
            if found is not None:
                delattr(config, key)
                config.quantization_config = QALoRAQuantConfig.of(found).to_dict()


def refuse_unread(config: Any, requested: Any) -> None:
    """Refuse to load as a base of ours what is quantized in a format that cannot be one.

    Raises:
        CheckpointError: our config was given to from_pretrained, and the model's names another.
    """
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict) or not isinstance(requested, QALoRAQuantConfig):
        return
    method = stored.get("quant_method")
    if method != QUANT_METHOD and foreign_config(stored, Path(CONFIG_FILE)) is None:
        raise CheckpointError(
            f"{CONFIG_FILE}: is quantized already with quant_method {method!r}"
            f"{unread_note(method)}: it cannot be a base. Give the 16-bit model that it was made "
            "from, or quantize that one with `qalora quantize`."
        )


def install() -> None:
    """Wrap transformers' choice of a quantizer at two places; a second call does nothing."""
    original = AutoHfQuantizer.merge_quantization_configs
    if hasattr(original, _INSTALLED):
        return

    @functools.wraps(original)
    def merge_quantization_configs(stored: Any, requested: Any) -> Any:
        config = merge_configs(stored, requested)
        return original(stored, requested) if config is None else config

    setattr(merge_quantization_configs, _INSTALLED, original)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)
    choose = modeling_utils.get_hf_quantizer

    @functools.wraps(choose)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        name_unnamed(config)
        refuse_unread(config, args[0] if args else kwargs.get("quantization_config"))
        return choose(config, *args, **kwargs)

    modeling_utils.get_hf_quantizer = get_hf_quantizer
