"""Options that need no model to be refused, in the words of each door."""

import pytest
import torch

from qalora_plugin import QuantizeOptions, quantize_model
from qalora_plugin.errors import ConfigError, QuantizationError
from qalora_plugin.quantize.options import OptionError, read_options

TEXT = ["some text"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 5}, "^bits must be one of"),
        ({"bits": 4.0}, "^bits must be one of"),
        ({"group_size": 0}, "^group_size must be a positive integer"),
        ({"group_size": -2}, "^group_size must be a positive integer"),
        ({"method": "awq"}, "^method must be one of"),
        ({"ordering": "act"}, "^ordering must be one of"),
        ({"dtype": "float32"}, "^dtype must be one of .* found 'float32'"),
        ({"damp": 0.0}, "^damp must lie between 0 and 1"),
        ({"samples": 0}, "samples of 1 or more and seq_len of 2 or more, found 0 and 512"),
        ({"seq_len": 1}, "samples of 1 or more and seq_len of 2 or more, found 128 and 1"),
        ({"zero_points": "float"}, "^zero_points must be one of"),
        ({"format": "awq"}, "^format must be one of"),
        (
            {"format": "gptq", "zero_points": "real"},
            "^format 'gptq' holds integer zero-points",
        ),
        ({"offsets_at": "zero"}, "^offsets_at must be one of"),
        (
            {"offsets_at": "minimum", "zero_points": "integer"},
            "^offsets_at 'minimum' needs real-valued offsets: with zero_points 'integer'",
        ),
        (
            {"offsets_at": "minimum", "zero_points": "none"},
            "needs real-valued offsets: with zero_points 'none'",
        ),
        ({"offsets_at": "minimum", "format": "gptq"}, "needs .* offsets: with format 'gptq'"),
        ({"dynamic": {"x": {"width": 8}}}, r"^dynamic\['x'\] has unknown keys \['width'\]"),
        ({"dynamic": {"x": {"bits": 7}}}, r"^dynamic\['x'\]: bits must be one of"),
        ({"modules_to_not_convert": "down_proj"}, "must be a list of names, found 'down_proj'"),
        ({"desc_act": True, "ordering": "none"}, "leave out one of it and ordering"),
        ({"method": "rtn"}, "^calibration does not go with method 'rtn'"),
        ({"method": "rtn", "calibration": torch.zeros(2, 3)}, "^calibration does not go with"),
        ({"method": "rtn", "calibration": None, "desc_act": True}, "^desc_act does not go with"),
        ({"method": "rtn", "calibration": None, "ordering": "none"}, "^ordering does not go with"),
        ({"calibration": torch.zeros(2, 3), "seq_len": 4}, r"^seq_len is 4, .* shape \(2, 3\)"),
        ({"calibration": None}, "^GPTQ needs text: give calibration a .txt .* method 'rtn'"),
    ],
)
def test_what_contradicts_or_is_out_of_range_is_refused(settings, message):
    with pytest.raises((ConfigError, QuantizationError), match=message):
        QuantizeOptions(**{"calibration": TEXT, **settings})


def test_the_same_error_in_another_spelling():
    with pytest.raises(OptionError) as caught:
        QuantizeOptions(method="rtn", desc_act=True)
    spelled = caught.value.spelled(lambda name, value: f"<{name}>" if value is None else value)
    assert spelled.startswith("<desc_act> does not go with rtn, which uses no calibration data")
    assert spelled.endswith("or use gptq")


def test_what_follows_from_the_format_and_the_order():
    stock = QuantizeOptions(calibration=TEXT, format="gptq", desc_act=True)
    assert stock.zeros == "integer" and stock.config().offsets_dtype == "float32"
    assert stock.solver.ordering == "act"
    plain = QuantizeOptions(calibration=torch.zeros(2, 3, dtype=torch.int64))
    assert plain.zeros == "real" and plain.config().offsets_dtype == "float16"
    assert plain.solver.ordering == "groups"
    symmetric = QuantizeOptions(method="rtn", format="gptq", zero_points="none")
    assert symmetric.zeros == "none" and symmetric.config().offsets_dtype == "float16"


def test_keywords_are_the_options_or_replace_some():
    options = QuantizeOptions(method="rtn", bits=3, group_size=64)
    changed = read_options(options, {"bits": 8})
    assert (changed.bits, changed.group_size, options.bits) == (8, 64, 3)
    assert read_options(None, {"method": "rtn", "bits": 2}).bits == 2
    with pytest.raises(OptionError, match="desc_act does not go with"):
        read_options(options, {"desc_act": True})


def test_an_unknown_keyword_is_named_with_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no option is called bitz; the options are bits, target_bits, group"
    ):
        quantize_model(tmp_path / "model", tmp_path / "out", bitz=4)


@pytest.mark.parametrize(
    "name, value",
    [("samples", 3), ("seq_len", 64), ("damp", 0.1), ("mse", False), ("dtype", torch.float16)],
)
def test_settings_of_gptq_do_not_go_with_rtn(name, value):
    with pytest.raises(ConfigError, match=f"{name} is a setting of GPTQ"):
        QuantizeOptions(method="rtn", **{name: value})
