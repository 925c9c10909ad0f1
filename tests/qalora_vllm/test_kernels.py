"""The kernels of the vLLM plugin that need torch only, and the choice between them."""

import json
from pathlib import Path

import pytest
import torch
from support.layers import quant_layer

from qalora_kernels import PackedWeight
from qalora_vllm import kernels
from qalora_vllm.kernels import (
    ENVIRONMENT_VARIABLE,
    Int4PackKernel,
    QALoRAKernel,
    join,
    make_kernel,
)


def weight(bits=4, **changes):
    return quant_layer(bits, in_features=128, out_features=32, **changes).packed


def inputs(rows, dtype):
    return torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).to(dtype)


def reordered(source):
    return PackedWeight(*source.tensors[:3], source.g_idx.flip(0), source.spec)


def test_neighbours_with_one_grid_are_joined():
    parts = [weight(), weight(), weight(3), weight(4, group_size=16), weight(4, group_size=16)]
    found = join(parts)
    assert [part.spec.out_features for part in found] == [64, 32, 64]
    dense = torch.cat([part.dequantize() for part in parts], dim=1)
    assert torch.equal(torch.cat([part.dequantize() for part in found], dim=1), dense)


def test_orders_of_groups_are_joined_where_they_are_the_same():
    one = weight(act_order=True)
    assert [part.spec.out_features for part in join([one, one])] == [64]
    assert len(join([one, reordered(one)])) == 2
    assert len(join([one, weight()])) == 2


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_int4pack_is_as_close_as_bf16_is(rows, monkeypatch):
    packed, x = weight(), inputs(rows, torch.bfloat16)
    most = 4 * packed.spec.in_features * packed.spec.out_features
    monkeypatch.setattr(kernels, "INT4PACK_PRODUCTS", most)
    found, ours = Int4PackKernel(packed)(x), QALoRAKernel(packed)(x)
    exact = x.double() @ packed.dequantize(torch.float64)
    dense = x @ packed.dequantize(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    error, bound = (found - exact).pow(2).mean().sqrt(), (dense - exact).pow(2).mean().sqrt()
    assert error < 1.5 * bound
    assert torch.equal(found, ours) == (rows > 4)  # above the limit our operator is what ran


def test_int4pack_keeps_its_choice_in_a_graph_for_any_number_of_rows():
    kernel = Int4PackKernel(weight())
    traced = torch.export.export(
        kernel, (inputs(8, torch.bfloat16),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [
        torch.ops.qalora_vllm.int4pack_linear.default
    ]
    x = inputs(40, torch.bfloat16)
    assert torch.equal(traced.module()(x), kernel(x))


@pytest.mark.parametrize("changes", [{}, {"bits": 3}, {"act_order": True}, {"group_size": -1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_our_operators_serve_everything(changes, dtype):
    packed, x = weight(**changes), inputs(5, dtype)
    exact = x.double() @ packed.dequantize(torch.float64)
    found = QALoRAKernel(packed)(x)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=32 * torch.finfo(dtype).eps)


def test_the_environment_variable_overrides_the_choice(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "int4pack")
    assert type(make_kernel(weight(), torch.bfloat16)) is Int4PackKernel
    for other, dtype in (
        (weight(), torch.float32),
        (weight(3), torch.bfloat16),
        (weight(act_order=True), torch.bfloat16),
        (weight(group_size=16), torch.bfloat16),
    ):
        assert type(make_kernel(other, dtype)) is QALoRAKernel
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "qalora")
    assert type(make_kernel(weight(), torch.bfloat16)) is QALoRAKernel
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "marlin")
    with pytest.raises(ValueError, match=r"QALORA_VLLM_KERNEL must be one of .*'marlin'"):
        make_kernel(weight(), torch.bfloat16)


def test_the_speed_in_the_docs_is_the_measured_one():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "serving.md").read_text()
    lines = (root / "integration" / "vllm" / "results" / "speed.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def between(batch):
        found = [row["ratio"] for row in rows if row["batch"] == batch]
        return f"{min(found):.2f} to {max(found):.2f} times"

    assert f"gave {between(1)} the tokens a second" in text
    assert f"and {between(8)} for eight at once, in nine runs" in text
    assert len(rows) == 2 * 9
