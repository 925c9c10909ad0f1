"""The scales' learning rate as one of Axolotl's `lr_groups`. Axolotl itself is not imported."""

import pytest

from qalora_plugin.axolotl import QALoRABlock
from qalora_plugin.axolotl.rates import GROUP, set_scale_rate
from qalora_plugin.errors import ConfigError
from qalora_plugin.tuner.parameter_groups import SCALE_LR_RATIO


def _config(block, **keys):
    qalora = QALoRABlock(**block).model_dump()
    return {"learning_rate": 2e-4, "optimizer": "adamw_torch", "qalora": qalora} | keys


@pytest.mark.parametrize("adapt", ["scales", "both"])
def test_a_group_for_the_scales(adapt):
    cfg = _config({"adapt": adapt})
    set_scale_rate(cfg)
    (group,) = cfg["lr_groups"]
    assert group["modules"] == ["qalora_scale_"]
    assert group["lr"] == pytest.approx(2e-4 * SCALE_LR_RATIO)


def test_the_recipes_own_groups_come_first_and_setting_twice_is_once():
    theirs = {"name": "attention", "modules": ["self_attn"], "lr": 1e-5}
    cfg = _config({"adapt": "both", "scale_learning_rate_ratio": 2}, lr_groups=[theirs])
    set_scale_rate(cfg)
    set_scale_rate(cfg)
    assert [group["name"] for group in cfg["lr_groups"]] == ["attention", GROUP]
    assert cfg["lr_groups"][1]["lr"] == pytest.approx(4e-4)


@pytest.mark.parametrize(
    ("adapt", "keys", "reason"),
    [
        ("zeros", {}, "adapt: zeros trains no scales"),
        ("both", {"loraplus_lr_ratio": 16}, "loraplus_lr_ratio sets the rates"),
        ("both", {"optimizer": "muon"}, "optimizer: muon sets its own rates"),
    ],
)
def test_no_group_where_there_is_no_use(adapt, keys, reason):
    cfg = _config({"adapt": adapt}, **keys)
    set_scale_rate(cfg)
    assert "lr_groups" not in cfg
    cfg = _config({"adapt": adapt, "scale_learning_rate_ratio": 4}, **keys)
    with pytest.raises(ConfigError, match=reason):
        set_scale_rate(cfg)
