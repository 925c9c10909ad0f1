"""`QuantLinear.weight`: what models may ask of it, and what they may not."""

import copy
from dataclasses import replace

import pytest
import torch
from support.layers import quant_layer

from qalora_plugin.errors import ConfigError
from qalora_plugin.layers.linear import QuantLinear


def layer():
    return quant_layer(in_features=64, bias=False)


def test_weight_has_shape_dtype_and_device_and_follows_casts():
    weight = layer().weight
    assert isinstance(weight, torch.Tensor) and weight.shape == (24, 64)
    assert weight.dtype == torch.float32 and weight.device.type == "cpu"
    assert layer().bfloat16().weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer().half()).weight.dtype == torch.float16
    assert layer().to("meta").weight.device.type == "meta"


def test_numbers_are_taken_over_as_they_are_stored():
    given = quant_layer(bits=3, act_order=True).packed
    wide = replace(given, scales=given.scales.double(), g_idx=given.g_idx.long())
    for minimum in (False, True):
        spec = replace(given.spec, offsets_dtype=torch.float32, offsets_at="minimum")
        made = QuantLinear.from_packed(replace(wide, spec=spec if minimum else given.spec))
        held = made.packed
        assert held.scales.dtype == torch.float16 and held.g_idx.dtype == torch.int32
        for name in ("qweight", "scales", "g_idx"):
            assert torch.equal(getattr(held, name), getattr(given, name))
        assert not made.qweight.requires_grad and made.bias is None
    # in fp16 the weight at code 0, so that the offset is the sum of two fp16 numbers
    below = held.offsets - held.scales.float() * 4
    assert torch.equal(below, below.half().float())


def test_casting_the_model_keeps_the_numbers():
    made = quant_layer()
    before = copy.deepcopy(made.state_dict())
    for dtype in (torch.bfloat16, torch.float64):
        made.to(dtype)
        assert made.bias.dtype == dtype
        for name in ("qweight", "scales", "offsets"):
            found = getattr(made, name)
            assert found.dtype == before[name].dtype and torch.equal(found, before[name])


def test_weight_is_nothing_that_is_saved_or_trained():
    made = layer()
    assert made.weight.data_ptr() == 0  # no memory
    assert set(made.state_dict()) == {"qweight", "scales", "offsets"}
    assert {name for name, _ in made.named_parameters()} == {"qweight"}
    assert "24, 64" in repr(made.weight)


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight @ torch.ones(64),
        lambda weight: torch.nn.functional.linear(torch.ones(2, 64), weight),
        lambda weight: weight.t(),
        lambda weight: weight.float() + 1,
        lambda weight: weight[0],
        lambda weight: weight.clone(),
        lambda weight: weight.mul_(2),
    ],
)
def test_the_numbers_of_weight_are_refused(use):
    with pytest.raises(ConfigError, match="modules_to_not_convert"):
        use(layer().weight)
