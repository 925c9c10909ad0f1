"""The learning rate of the scales' part, through Axolotl's own `lr_groups`."""

from typing import Any

from ..errors import ConfigError
from ..tuner.names import SCALE_PREFIX
from ..tuner.parameter_groups import SCALE_LR_RATIO

GROUP = "qalora_scales"
_WITHOUT_GROUPS = ("dion", "muon", "polora", "sinkgd")  # made from the model, not from groups


def set_scale_rate(cfg: Any) -> None:
    """Add a group for the scales' part to a validated config.

    The recipe's own groups stand before ours, and the first that matches a parameter counts. With
    LoRA+, which sets rates itself, or an optimizer that takes no groups, there is none, unless the
    recipe asks for a ratio.

    Raises:
        ConfigError: `scale_learning_rate_ratio` is set where it cannot be served.
    """
    ratio = cfg["qalora"]["scale_learning_rate_ratio"]
    reason = _why_not(cfg)
    if reason is not None:
        if ratio is not None:
            raise ConfigError(f"qalora: scale_learning_rate_ratio: {ratio}: {reason}; remove it")
        return
    rate = cfg["learning_rate"] * (SCALE_LR_RATIO if ratio is None else ratio)
    ours = {"name": GROUP, "modules": [SCALE_PREFIX], "lr": rate}
    theirs = [group for group in cfg.get("lr_groups") or [] if group["name"] != GROUP]
    cfg["lr_groups"] = [*theirs, ours]


def _why_not(cfg: Any) -> str | None:
    if cfg["qalora"]["adapt"] == "zeros":
        return "adapt: zeros trains no scales"
    if cfg.get("loraplus_lr_ratio"):
        return "loraplus_lr_ratio sets the rates of A and B"
    if cfg.get("optimizer") in _WITHOUT_GROUPS:
        return f"optimizer: {cfg['optimizer']} sets its own rates"
    return None
