"""Find the repeated transformer blocks of a model, and its vision and audio towers."""

from typing import Any

from torch import nn

from ..errors import ConfigError

_SENSES = ("vision_config", "audio_config")


def reads_text(model: nn.Module) -> bool:
    """Say whether the first thing that a model of transformers takes is token ids."""
    modalities: Any = getattr(model, "input_modalities", "text")
    main = getattr(model, "main_input_name", "input_ids")
    part = getattr(getattr(model, "config", None), "base_config_key", "")  # Qwen2.5-VL says it here
    return main == "input_ids" and "text" in modalities and part not in _SENSES


def find_towers(model: nn.Module) -> list[str]:
    """Return the names of the models for images and sounds inside one that reads text.

    A model that reads no text itself (ViT, Whisper) has none: there the encoder is the model.
    """
    towers: list[str] = []
    if not reads_text(model):
        return towers
    for name, module in model.named_modules():
        is_model = isinstance(getattr(module, "main_input_name", None), str)
        if is_model and not reads_text(module) and not name.startswith(tuple(_inside(towers))):
            towers.append(name)
    return towers


def _inside(names: list[str]) -> list[str]:
    return [f"{name}." for name in names]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of a model's repeated blocks.

    That is the `nn.ModuleList` with the most weights, but for vision or audio towers.

    Raises:
        ConfigError: the model has no such list.
    """
    towers = tuple(_inside(find_towers(model)))
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        nested = any(name.startswith(outer + ".") for outer in sizes)
        if not nested and not name.startswith(towers):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not any(sizes.values()):
        raise ConfigError(
            f"{type(model).__name__}: expected an nn.ModuleList of transformer blocks, found none; "
            "this architecture cannot be quantized block by block"
        )
    name = max(sizes, key=lambda key: sizes[key])
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks
