"""Stock GPTQ from a merged model: exact with adapt="scales", refused with changed offsets."""

from pathlib import Path

import pytest
import torch

from qalora_plugin import merge_adapter
from qalora_plugin.checkpoint.base import QuantizedCheckpoint, open_quantized
from qalora_plugin.checkpoint.stock_writer import integer_zeros
from qalora_plugin.errors import CheckpointError, ConfigError
from qalora_plugin.export import export_model

from .test_lora import write_adapter

STOCK = Path(__file__).parent.parent / "fixtures" / "gptq_4bit_g32_asym"


def test_merged_scales_keep_integers_and_zero_points(tmp_path: Path) -> None:
    base = QuantizedCheckpoint(STOCK)
    adapter = write_adapter(base, tmp_path / "adapter", "scales")
    merge_adapter(adapter, tmp_path / "merged", STOCK)
    result = export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    assert (result.layers, result.dense) == (len(base.layers), {})
    merged, exported = open_quantized(tmp_path / "merged"), open_quantized(result.out)
    assert exported.stock is not None
    for name, spec in base.layers.items():
        before, wanted, found = base.layer(name), merged.layer(name), exported.layer(name)
        assert torch.equal(found.qweight, before.qweight)
        assert torch.equal(found.scales, wanted.scales)
        assert torch.equal(found.offsets, wanted.offsets)
        assert not torch.equal(found.scales, before.scales)
        zeros = [integer_zeros(name, layer, spec) for layer in (before, found)]
        assert torch.equal(*zeros)


def test_changed_offsets_are_refused_by_name(tmp_path: Path) -> None:
    adapter = write_adapter(QuantizedCheckpoint(STOCK), tmp_path / "adapter")
    merge_adapter(adapter, tmp_path / "merged", STOCK)
    with pytest.raises(CheckpointError, match=r"zero-points are not integers .* away"):
        export_model(tmp_path / "merged", tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


def test_unknown_format_and_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one of gptq, .* found 'hqq'"):
        export_model(STOCK, tmp_path / "out", "hqq")
    with pytest.raises(ConfigError, match="'mlx' has no option 'base'"):
        export_model(STOCK, tmp_path / "out", "mlx", base="x")
