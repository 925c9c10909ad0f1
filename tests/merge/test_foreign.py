"""Conventions and pooling groups against the code that they come from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn

from qalora_kernels import LowRank, PackedWeight, QuantSpec, reference
from qalora_plugin.errors import AdapterError
from qalora_plugin.merge.conventions import convention_factor, pool_size_of, regroup
from qalora_plugin.verify.additive import pooled

N, RANK, SCALING = 24, 4, 0.75


def _matrices(columns):
    gen = torch.Generator().manual_seed(columns)
    a = torch.randn(RANK, columns, generator=gen, dtype=torch.float64)
    return a, torch.randn(N, RANK, generator=gen, dtype=torch.float64)


def _peft_change(x, a, b, pool):
    """What PEFT's own code adds to the output."""
    lora_a = nn.Linear(a.shape[1], RANK, bias=False, dtype=a.dtype)
    lora_b = nn.Linear(RANK, N, bias=False, dtype=a.dtype)
    lora_a.weight.data, lora_b.weight.data = a, b
    module = SimpleNamespace(
        lora_A={"d": lora_a},
        lora_B={"d": lora_b},
        lora_dropout={"d": nn.Identity()},
        scaling={"d": SCALING},
        qalora_group_size={"d": pool},
        training=False,
        in_features=x.shape[1],
    )
    with torch.no_grad():
        return QALoraLinearVariant.forward(module, "d", x, x.new_zeros(x.shape[0], N))


def _authors_change(x, a, b, pool):
    """The QA-LoRA authors' layer: lora_B(lora_A(qa_pool(x))) * scaling, qa_pool an AvgPool1d."""
    features = nn.AvgPool1d(pool)(x.unsqueeze(1)).squeeze(1)
    return nn.functional.linear(nn.functional.linear(features, a), b) * SCALING


CODE = {"peft": _peft_change, "mean": _authors_change}


@pytest.mark.parametrize("convention", CODE)
@pytest.mark.parametrize(
    ("k", "group", "pool"),
    [
        (128, 32, 32),
        (128, 32, 16),  # splits groups
        (128, 32, 64),  # shares a change between groups
        (128, 128, 32),
        (128, 32, 128),
        (172, 172, 43),  # one group a row
        (172, 43, 86),
    ],
)
def test_merged_layer_equals_the_code_that_trained_it(convention, k, group, pool):
    gen = torch.Generator().manual_seed(0)
    spec = QuantSpec(4, group, k, N, torch.float64, torch.float64)
    codes = torch.randint(16, (k, N), generator=gen)
    scales, offsets = torch.rand(2, spec.num_groups, N, generator=gen, dtype=torch.float64)
    base = PackedWeight.from_codes(codes.t(), scales, offsets, None, spec)
    a, b = _matrices(k // pool)
    x = torch.randn(5, k, generator=gen, dtype=torch.float64)

    plan = regroup("layer", spec, None, pool)
    factor = SCALING * convention_factor(convention, pool, k)
    split = replace(spec, group_size=plan.group_size)
    grid = (plan.split(scales), plan.split(offsets))
    merged = PackedWeight(base.qweight, *grid, None, split)
    merged = merged.fold(LowRank(plan.spread(a), b, factor), None)
    merged_y = x @ reference.dequantize(merged, torch.float64)
    base_y = x @ reference.dequantize(base, torch.float64)
    wanted = base_y + CODE[convention](x, a, b, pool)
    assert (merged_y - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize("convention", CODE)
def test_verifys_formula_is_that_of_the_code(convention):
    x = torch.randn(3, 96, dtype=torch.float64)
    a, b = _matrices(96 // 32)
    added = pooled(x, convention, 32) @ a.t() @ b.t() * SCALING
    torch.testing.assert_close(added, CODE[convention](x, a, b, 32), rtol=1e-13, atol=1e-13)


def test_authors_pooling_leaves_an_incomplete_window_out():
    # 172 inputs, windows of 32: AvgPool1d gives 5 features, the last 12 inputs reach none
    spec = QuantSpec(4, 32, 172, N)
    assert pool_size_of("layer", 5, spec, None) == 32
    plan = regroup("layer", spec, None, 32)
    spread = plan.spread(torch.ones(RANK, 5))
    assert spread.shape == (RANK, 6)
    assert spread[:, :5].eq(1).all() and spread[:, 5].eq(0).all()


@pytest.mark.parametrize(("group", "pool"), [(32, 48), (48, 32), (32, 20)])
def test_groups_that_do_not_nest_are_refused(group, pool):
    with pytest.raises(AdapterError, match="Neither divides the other"):
        regroup("model.q_proj", QuantSpec(4, group, 960, N), None, pool)


def test_act_order_groups_across_pools_are_refused():
    g_idx = torch.randperm(128, generator=torch.Generator().manual_seed(0)) // 32
    with pytest.raises(AdapterError, match=r"q_proj.*act-order"):
        regroup("q_proj", QuantSpec(4, 32, 128, N), g_idx.int(), 32)


def test_act_order_groups_within_pools_are_merged():
    halves = torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32
    g_idx = torch.cat([halves + 2, halves]).int()  # groups 2 and 3 in the first half
    plan = regroup("layer", QuantSpec(4, 32, 128, N), g_idx, 64)
    assert plan.base_group is None
    assert plan.column is not None and plan.column.tolist() == [1, 1, 0, 0]


def test_plain_lora_is_refused():
    with pytest.raises(AdapterError, match="plain LoRA"):
        pool_size_of("layer", 128, QuantSpec(4, 32, 128, N), None)


def test_stated_pooling_that_contradicts_the_tensor_is_refused():
    with pytest.raises(AdapterError, match="expected 8 columns"):
        pool_size_of("layer", 4, QuantSpec(4, 32, 128, N), 16)


def test_columns_that_fit_no_pooling_are_refused():
    with pytest.raises(AdapterError, match="5 columns fit no pooling of 128"):
        pool_size_of("layer", 5, QuantSpec(4, 32, 128, N), None)
