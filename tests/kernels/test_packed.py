"""`PackedWeight` outside of the operators: codes, columns, folding; and what a spec refuses."""

import itertools

import pytest
import torch

from qalora_kernels import LowRank, PackedWeight, QuantSpec


def test_codes_come_back(bits, make_weight):
    weight = make_weight(bits, "act_order")
    codes = weight.codes()
    assert codes.shape == (37, 172) and codes.dtype == torch.uint8 and codes.is_contiguous()
    again = PackedWeight.from_codes(
        codes, weight.scales, weight.offsets, weight.g_idx.long(), weight.spec
    )
    assert again.g_idx.dtype == torch.int32
    for ours, theirs in zip(again.tensors, weight.tensors, strict=True):
        assert torch.equal(ours, theirs)


def test_some_outputs(make_weight):
    weight = make_weight(3, "act_order")
    part = weight.columns(slice(5, 50))
    assert part.spec.out_features == 32 and part.spec.in_features == 172
    fp32 = torch.float32
    assert torch.equal(part.dequantize(fp32), weight.dequantize(fp32)[:, 5:])


@pytest.mark.parametrize("layout", ["even", "short_last_group", "group_across_words", "one_group"])
@pytest.mark.parametrize("cuts", [(0, 64, 96, 128), (0, 43, 86, 128), (0, 1, 33, 50, 128)])
def test_cut_along_the_inputs(bits, layout, cuts, make_weight):
    weight = make_weight(bits, layout)
    dense = weight.dequantize()
    for start, stop in itertools.pairwise((*cuts, weight.spec.in_features)):
        if start < stop:
            part = weight.inputs(start, stop)
            assert part.spec.in_features == stop - start and part.g_idx is None
            assert torch.equal(part.dequantize(), dense[start:stop])


@pytest.mark.parametrize("ranks", [1, 2, 4, 43])
def test_cut_along_the_inputs_with_act_order(bits, ranks, make_weight):
    weight = make_weight(bits, "act_order")
    dense, width = weight.dequantize(), weight.spec.in_features // ranks
    for rank in range(ranks):
        start, stop = rank * width, (rank + 1) * width
        part = weight.inputs(start, stop)
        assert part.qweight.shape[0] == part.spec.packed_rows
        assert torch.equal(part.dequantize(), dense[start:stop])


def test_an_aligned_cut_keeps_the_groups(make_weight):
    part = make_weight(4, "even").inputs(64, 128)
    assert (part.spec.group_size, part.scales.shape[0]) == (32, 2)


@pytest.mark.parametrize("cut", [(-1, 5), (5, 5), (0, 173)])
def test_a_cut_that_cannot_be(cut, make_weight):
    with pytest.raises(ValueError, match="expected a range within 0 to 172"):
        make_weight(4, "act_order").inputs(*cut)


def test_folding_nothing_changes_nothing(make_weight):
    weight = make_weight(4)
    assert weight.fold(None, None) is weight


def test_folding_keeps_the_integers_and_the_dtypes(make_weight, randn):
    weight = make_weight(4, "act_order")
    change = LowRank(randn(4, 6), randn(37, 4), 0.1)
    folded = weight.fold(change, change)
    assert folded.qweight is weight.qweight and folded.g_idx is weight.g_idx
    for name in ("scales", "offsets"):
        old, new = getattr(weight, name), getattr(folded, name)
        assert old.dtype == new.dtype and not torch.equal(old, new)
        assert torch.equal(new, new.half().float())  # rounded to the spec's dtype
    only = weight.fold(change, None)
    assert only.scales is weight.scales


def test_specs_that_cannot_be():
    for arguments, message in (
        ((5, 32, 64, 64), "bits must be one of"),
        ((4, 0, 64, 64), "group_size must be positive"),
        ((4, 32, 0, 64), "in_features and out_features must be positive"),
        ((4, 32, 64, 64, torch.int32), "offsets_dtype must be a float dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantSpec(*arguments)
    with pytest.raises(ValueError, match="offsets_at must be one of"):
        QuantSpec(4, 32, 64, 64, offsets_at="zero")
    with pytest.raises(ValueError, match="needs offsets_dtype float32"):
        QuantSpec(4, 32, 64, 64, offsets_at="minimum")
    assert QuantSpec(4, 32, 64, 64).minimum_below is None
    assert QuantSpec(4, -1, 64, 64).group_size == 64
