"""Fused and library products agree, and plans come from the right table."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from qalora_kernels import reference
from qalora_kernels.backends.triton import matmul, tuning

FUSED = tuning.Plan(fused=True, block_m=16, block_out=32, block_in=16, splits=1)


@pytest.fixture
def run_with(monkeypatch):
    """Run a product of `matmul` under a given plan."""

    def run(plan, product, *arguments):
        monkeypatch.setattr(tuning, "plan", lambda *_: plan)
        return product(*arguments)

    return run


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("bits", [3, 4])
def test_fused_and_library_products_differ_by_summation_only(
    splits, bits, make_weight, randn, run_with
):
    weight = make_weight(bits, out_features=41)
    spec = weight.spec
    plan = replace(FUSED, splits=splits)
    half = torch.float16
    # 37 rows are three blocks, the last one short; one row is the vector kernel
    for m, block_m in ((37, 16), (1, 1)):
        x, dy = randn(m, spec.in_features, dtype=half), randn(m, spec.out_features, dtype=half)
        bias = randn(spec.out_features, dtype=half)
        plan = replace(plan, block_m=block_m)
        linear = (matmul.linear, x, weight, bias)
        torch.testing.assert_close(
            run_with(plan, *linear), run_with(tuning.LIBRARY, *linear), rtol=2e-3, atol=2e-3
        )
        plan = replace(plan, block_m=16)
        grad_input = (matmul.grad_input, dy, weight)
        torch.testing.assert_close(
            run_with(plan, *grad_input), run_with(tuning.LIBRARY, *grad_input), rtol=2e-3, atol=2e-3
        )


def test_the_fused_product_rounds_the_weight_to_the_dtype_of_x(make_weight, run_with):
    weight = make_weight(4)
    k = weight.spec.in_features
    one_hot = torch.eye(k, dtype=torch.float16, device=weight.qweight.device)[:3]
    for block_m, rows in ((16, one_hot), (1, one_hot[:1])):
        out = run_with(replace(FUSED, block_m=block_m), matmul.linear, rows, weight, None)
        dense = reference.dequantize(weight, torch.float32).half()
        assert torch.equal(out, dense[: len(rows)])


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU by name only: which plan it would get needs none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_plans", {})
    monkeypatch.setenv("QALORA_TUNING_CACHE", str(tmp_path / "cache" / "tuning.json"))
    monkeypatch.setattr(tuning, "_measure", lambda *_: pytest.fail("measured"))
    tuning.untuned.cache_clear()
    yield tmp_path / "cache" / "tuning.json"
    tuning.untuned.cache_clear()


def ask(weight, m, dtype=torch.bfloat16):
    rows = SimpleNamespace(shape=(m, 172), device=torch.device("cuda", 0), dtype=dtype)
    return tuning.plan("linear", rows, weight, lambda plan: None)


def test_many_rows_never_look_up(gpu, make_weight):
    assert ask(make_weight(4), tuning.BUCKETS[-1] + 1) == tuning.LIBRARY
    assert not gpu.exists()


def test_a_first_call_is_measured_once_and_remembered(gpu, make_weight, monkeypatch):
    measured = replace(FUSED, num_warps=8)
    calls = []
    monkeypatch.setattr(tuning, "_measure", lambda *_: calls.append(1) or measured)
    weight = make_weight(4)
    assert ask(weight, 5) == measured
    assert ask(weight, 16) == measured  # the same bucket
    assert len(calls) == 1
    written = json.loads(gpu.read_text())["tuned"]
    assert list(written) == ["Some GPU"]
    assert list(written["Some GPU"]) == [
        "linear bfloat16 bits=4 group_size=32 N=37 K=172 M<=16",
    ]
    ask(weight, 17)  # another bucket joins the file
    assert len(calls) == 2
    monkeypatch.setattr(tuning, "_plans", {})  # a new process
    assert ask(weight, 3) == measured
    assert len(calls) == 2
    assert [file.name for file in gpu.parent.iterdir()] == ["tuning.json"]


def test_nothing_is_measured_in_a_graph_capture_or_when_off(gpu, make_weight, monkeypatch):
    weight = make_weight(4)
    default = tuning.Plan(**tuning._shipped()["untuned_defaults"]["9"]["linear"]["16"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ask(weight, 16) == default
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("QALORA_TUNING_CACHE", "off")
    assert ask(weight, 16) == default
    assert not gpu.exists()


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        '{"tuned": 1}',
        '{"tuned": {"Some GPU": 1}}',
        '{"tuned": {"Some GPU": {"k": {"new": 1}}}}',
    ],
)
def test_a_broken_cache_file_is_ignored_with_a_warning(
    broken, gpu, make_weight, monkeypatch, caplog
):
    monkeypatch.setattr(tuning, "_measure", lambda *_: FUSED)
    gpu.parent.mkdir()
    gpu.write_text(broken)
    assert ask(make_weight(4), 1) == FUSED
    assert "ignoring the tuning cache" in caplog.text
    assert json.loads(gpu.read_text())["tuned"]["Some GPU"]


def test_without_a_home_directory_nothing_is_tuned(gpu, make_weight, monkeypatch):
    def no_home(*parts):
        raise OSError("no home directory is known")

    monkeypatch.delenv("QALORA_TUNING_CACHE")
    monkeypatch.setattr(tuning.cache, "path", no_home)
    with pytest.warns(RuntimeWarning, match="kernels are not tuned: no home directory"):
        plan = ask(make_weight(4), 16)
    assert plan == tuning.Plan(**tuning._shipped()["untuned_defaults"]["9"]["linear"]["16"])


def test_every_shipped_plan_can_be_read():
    shipped = tuning._shipped()
    for table in shipped["untuned_defaults"].values():
        for op in ("linear", "grad_input"):
            assert {int(bucket) for bucket in table[op]} <= set(tuning.BUCKETS)
            assert all(tuning.Plan(**entry).fused for entry in table[op].values())
    for by_bucket in shipped["candidates"].values():
        for entries in by_bucket.values():
            assert all(tuning.Plan(**entry).fused for entry in entries)
    for plans in shipped["tuned"].values():
        assert all(tuning.Plan(**entry) for entry in plans.values())
