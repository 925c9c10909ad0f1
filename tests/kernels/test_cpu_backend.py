"""What the CPU backend does beyond the contract that `test_operators` holds every backend to."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch

from qalora_kernels import PackedWeight, QuantSpec, pack_halves, packing
from qalora_kernels.backends import cpu
from qalora_kernels.backends import torch as plain
from qalora_kernels.backends.cpu import native
from qalora_kernels.backends.cpu.workspace import workspace


@pytest.fixture
def compiled():
    if not (native.dequantizes(torch.bfloat16) and native.multiplies()):
        pytest.skip("no C compiler: the plain PyTorch path is all there is to test")


@pytest.fixture
def few_rows(monkeypatch):
    """Small layers too take the path of a few rows."""
    monkeypatch.setattr(cpu, "FEW_ROWS_WEIGHTS", 0)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("instruction_sets")


@pytest.fixture(params=["AVX512", "AVX512 without bf16", "AVX2", "DEFAULT"])
def instruction_set(request, compiled, fresh_library, shared_cache, monkeypatch):
    """Code for each instruction set that this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    order = ["DEFAULT", "AVX2", "AVX512"]
    best = torch.backends.cpu.get_cpu_capability()
    capability = request.param.split()[0]
    if capability != best and (best not in order or order.index(capability) > order.index(best)):
        pytest.skip(f"this machine has {best}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    if request.param.endswith("without bf16"):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    return request.param


def make(bits=4, in_features=96, out_features=70, group_size=32, act_order=False):
    spec = QuantSpec(bits, group_size, in_features, out_features)
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
    grid = (spec.num_groups, out_features)
    scales = torch.rand(grid, generator=generator).half().float() + 0.01
    offsets = torch.randn(grid, generator=generator).half().float()
    order = torch.randperm(in_features, generator=generator)
    g_idx = order // spec.group_size if act_order else None
    return PackedWeight.from_codes(codes.t(), scales, offsets, g_idx, spec)


def with_grid(weight, dtype):
    return replace(weight, scales=weight.scales.to(dtype), offsets=weight.offsets.to(dtype))


def dense(backend, weight, dtype):
    shape = (weight.spec.in_features, weight.spec.out_features)
    return backend.dequantize(weight, torch.empty(shape, dtype=dtype))


# ---- the compiled code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dequantize_has_the_bits_of_plain_pytorch(bits, dtype, compiled, threads):
    weight = make(bits, in_features=172, out_features=1033, act_order=True)
    expected = dense(plain, weight, dtype)
    for count in (1, 2):
        threads(count)
        assert torch.equal(dense(cpu, weight, dtype), expected)


def test_every_instruction_set(instruction_set, few_rows):
    for bits in (2, 3, 4, 8):
        made = make(bits, in_features=172, out_features=101)
        for weight in (made, with_grid(made, torch.float16)):
            weight_t = dense(plain, weight, torch.float32)
            assert torch.equal(dense(cpu, weight, torch.float32), weight_t)
            bf16 = dense(plain, weight, torch.bfloat16)
            assert torch.equal(dense(cpu, weight, torch.bfloat16), bf16)
            for rows in (1, 6):
                x = torch.randn(rows, 172, generator=torch.Generator().manual_seed(rows))
                out = cpu.linear(x, weight, None)
                torch.testing.assert_close(out, x @ weight_t, rtol=1e-4, atol=1e-4 * 2**bits)
                x = x.bfloat16()
                out = cpu.linear(x, weight, None).float()
                exact = x.float() @ weight_t
                torch.testing.assert_close(out, exact, rtol=2**-8, atol=1e-4 * 2**bits)
    # and every number that fp16 has
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(64, 1024)
    spec = QuantSpec(8, 1, 64, 1024)
    mid = torch.full((1024, 64), spec.mid)  # then W is the offsets
    weight = PackedWeight.from_codes(mid, torch.ones(64, 1024), values, None, spec)
    out = dense(cpu, weight, torch.float32)
    assert torch.equal(out.nan_to_num(), values.float().nan_to_num())
    assert torch.equal(out.isnan(), values.isnan())


def test_what_is_not_finite_stays_so(compiled):
    weight = make()
    weight.scales[0, :3] = torch.tensor([torch.nan, torch.inf, 3.4e38])
    expected = dense(plain, weight, torch.bfloat16)
    out = dense(cpu, weight, torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize(
    ("bits", "group_size", "act_order"),
    [
        (2, 32, False),
        (2, 24, False),
        (3, 32, False),
        (3, 24, True),
        (4, 24, False),
        (4, 32, True),
        (8, 24, False),
        (8, 32, True),
    ],
)
def test_few_rows_over_several_blocks_of_columns(bits, group_size, act_order, compiled, few_rows):
    groups = {"group_size": group_size, "act_order": act_order}
    weight = make(bits, in_features=100, out_features=4133, **groups)
    weight_t = dense(plain, with_grid(weight, torch.float64), torch.float64)
    bias = torch.linspace(-1, 1, 4133)
    for rows, dtype in itertools.product((1, 3, 4, 5, 16), (torch.float32, torch.bfloat16)):
        x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows)).to(dtype)
        exact = x.double() @ weight_t + bias.double()
        out = cpu.linear(x, weight, bias)
        # the noise of an fp32 sum, against what is summed: W may cancel within a group
        magnitude = x.double().abs() @ weight_t.abs() + bias.abs()
        rounding = 2**-8 * exact.abs() if dtype == torch.bfloat16 else 0
        assert (((out.double() - exact).abs() - rounding) / magnitude).max() < 2e-6


def test_few_rows_round_once(compiled, few_rows):
    """bf16 activations cost the rounding of y and nothing else: W is never rounded to bf16."""
    weight = make(in_features=512)
    x = torch.randn(1, 512).bfloat16()
    weight_t = dense(plain, weight, torch.float32)
    out = cpu.linear(x, weight, None)
    torch.testing.assert_close(out, (x.float() @ weight_t).bfloat16(), rtol=2**-7, atol=1e-5)
    assert out.dtype == torch.bfloat16


def test_threads_do_not_change_the_result(bits, compiled, few_rows, threads):
    weight = make(bits, in_features=172, out_features=1033)
    x, dy = torch.randn(7, 172), torch.randn(7, 1033)
    results = []
    for count in (1, 2):
        threads(count)
        results.append((cpu.linear(x, weight, None), cpu.weighted_group_grad(dy, x, weight)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- the workspace


def test_workspace_is_reused_and_grows():
    small = workspace((8, 4), torch.bfloat16)
    assert small.shape == (8, 4) and small.dtype == torch.bfloat16
    large = workspace((1 << 12, 1 << 10), torch.float32)
    again = workspace((8, 4), torch.float32)
    assert again.data_ptr() == large.data_ptr() == workspace((1,), torch.bfloat16).data_ptr()


def test_results_do_not_live_in_the_workspace():
    weight = make()
    x = torch.randn(64, 96)
    first = cpu.linear(x, weight, None)
    weight_t, kept = dense(cpu, weight, torch.float32), first.clone()
    workspace((1 << 16,), torch.float32).fill_(torch.nan)
    assert torch.equal(first, kept)
    assert weight_t.isfinite().all()


def test_workspace_of_inference_mode_serves_training():
    weight = make(in_features=320, out_features=300)
    done = []

    def both():
        with torch.inference_mode():
            cpu.linear(torch.randn(64, 320), weight, None)
        done.append(cpu.grad_input(torch.randn(64, 300), weight))

    thread = threading.Thread(target=both)  # a thread starts with no workspace
    thread.start()
    thread.join()
    assert not done[0].is_inference()


def test_threads_have_their_own_workspace():
    weights = [make(bits) for bits in (2, 8)]
    x = torch.randn(64, 96)
    expected = [x @ dense(plain, weight, torch.float32) for weight in weights]
    wrong = []

    def work(index):
        for _ in range(200):
            if not torch.allclose(cpu.linear(x, weights[index], None), expected[index], atol=1e-3):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("rows", "streams"), [(1, 1), (5, 3), (16, 2), (70, 4), (513, 9)])
def test_packed_halves_are_those_of_plain_pytorch(rows, streams, compiled, threads):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (rows, streams, 20), generator=generator, dtype=torch.uint8)
    codes = torch.cat((blocks[..., 4:] & 15, blocks[..., 4:] >> 4), -1).view(rows, -1).t()
    expected = packing.pack(codes, 4)
    for count, pack in ((1, packing.pack_halves), (1, pack_halves), (2, pack_halves)):
        threads(count)
        out = torch.zeros(4 * streams, rows + 7, dtype=torch.int32)
        pack(blocks[..., 4:], out[:, 3 : rows + 3])
        assert torch.equal(out[:, 3 : rows + 3], expected)
        assert not out[:, :3].any() and not out[:, rows + 3 :].any()
