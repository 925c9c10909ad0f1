"""What the CPU backend does beyond the contract that `test_operators` holds every backend to."""

import functools
import subprocess
import threading
import warnings

import pytest
import torch

from qalora_kernels import QuantSpec, cpu, get_backend, pack, torch_backend
from qalora_kernels.cpu import build, native
from qalora_kernels.cpu.workspace import workspace


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """Nothing compiled yet; what other tests have loaded comes back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = build.library
    monkeypatch.setattr(native, "library", functools.cache(loaded.__wrapped__))
    return tmp_path / "qalora-plugin" / "cpu"


@pytest.fixture
def compiled():
    if not build._compiler():
        pytest.skip("no C compiler: the plain PyTorch path is all there is to test")
    assert native.dequantizes(torch.bfloat16) and native.multiplies(torch.bfloat16)


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
def instruction_set(request, compiled, fresh_cache, shared_cache, monkeypatch):
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


def make_layer(bits=4, in_features=96, out_features=70, group_size=32, act_order=False):
    """(qweight, scales, offsets, g_idx, spec)"""
    spec = QuantSpec(bits, group_size, in_features, out_features)
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
    grid = (spec.num_groups, out_features)
    scales = torch.rand(grid, generator=generator).half().float() + 0.01
    offsets = torch.randn(grid, generator=generator).half().float()
    order = torch.randperm(in_features, generator=generator)
    g_idx = (order // spec.group_size).int() if act_order else None
    return pack(codes, bits), scales, offsets, g_idx, spec


def test_the_cpu_is_served_by_this_backend(monkeypatch):
    monkeypatch.delenv("QALORA_BACKEND", raising=False)
    assert get_backend("cpu") is cpu
    monkeypatch.setenv("QALORA_BACKEND", "torch")
    assert get_backend("cpu") is torch_backend


def test_it_refuses_other_devices(monkeypatch):
    monkeypatch.setenv("QALORA_BACKEND", "cpu")
    with pytest.raises(ValueError, match="QALORA_BACKEND=cpu got tensors on cuda"):
        get_backend("cuda")


# ---- the compiled code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_dequantize_has_the_bits_of_plain_pytorch(bits, dtype, compiled, threads):
    layer = make_layer(bits, in_features=172, out_features=1033, act_order=True)
    expected = torch_backend.dequantize(*layer, dtype)
    for count in (1, 2):
        threads(count)
        assert torch.equal(cpu.dequantize(*layer, dtype), expected)


def test_every_instruction_set(instruction_set, few_rows):
    for bits in (2, 3, 4, 8):
        qweight, scales, offsets, g_idx, spec = make_layer(bits, in_features=172, out_features=101)
        for grid in (torch.float32, torch.float16):
            layer = (qweight, scales.to(grid), offsets.to(grid), g_idx, spec)
            weight_t = torch_backend.dequantize(*layer, torch.float32)
            assert torch.equal(cpu.dequantize(*layer, torch.float32), weight_t)
            bf16 = torch_backend.dequantize(*layer, torch.bfloat16)
            assert torch.equal(cpu.dequantize(*layer, torch.bfloat16), bf16)
            for rows in (1, 6):
                x = torch.randn(rows, 172, generator=torch.Generator().manual_seed(rows))
                out = cpu.linear(x, *layer[:4], None, spec)
                torch.testing.assert_close(out, x @ weight_t, rtol=1e-4, atol=1e-4 * 2**bits)
                x = x.bfloat16()
                out = cpu.linear(x, *layer[:4], None, spec).float()
                exact = x.float() @ weight_t
                torch.testing.assert_close(out, exact, rtol=2**-8, atol=1e-4 * 2**bits)


def test_every_fp16_number_is_read_exactly(instruction_set):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).view(64, 1024)
    spec = QuantSpec(8, 1, 64, 1024)
    mid = pack(torch.full((64, 1024), spec.mid), 8)  # then W is the offsets
    out = cpu.dequantize(mid, torch.ones(64, 1024), values, None, spec, torch.float32)
    assert torch.equal(out.nan_to_num(), values.float().nan_to_num())
    assert torch.equal(out.isnan(), values.isnan())


def test_what_is_not_finite_stays_so(compiled):
    qweight, scales, offsets, g_idx, spec = make_layer()
    scales[0, :3] = torch.tensor([torch.nan, torch.inf, 3.4e38])
    expected = torch_backend.dequantize(qweight, scales, offsets, g_idx, spec, torch.bfloat16)
    out = cpu.dequantize(qweight, scales, offsets, g_idx, spec, torch.bfloat16)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16])
@pytest.mark.parametrize("group_size", [24, 32, "act-order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_over_several_blocks_of_columns(rows, group_size, dtype, bits, compiled, few_rows):
    act_order = group_size == "act-order"
    groups = {"group_size": 24 if act_order else group_size, "act_order": act_order}
    layer = make_layer(bits, in_features=100, out_features=4133, **groups)
    qweight, scales, offsets, g_idx, spec = layer
    x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.linspace(-1, 1, 4133)
    weight_t = torch_backend.dequantize(
        qweight, scales.double(), offsets.double(), g_idx, spec, torch.float64
    )
    exact = x.double() @ weight_t + bias.double()
    out = cpu.linear(x, qweight, scales, offsets, g_idx, bias, spec)
    # the noise of an fp32 sum, against what is summed: W may cancel within a group
    magnitude = x.double().abs() @ weight_t.abs() + bias.abs()
    rounding = 2**-8 * exact.abs() if dtype == torch.bfloat16 else 0
    assert (((out.double() - exact).abs() - rounding) / magnitude).max() < 2e-6


def test_few_rows_round_once(compiled, few_rows):
    """bf16 activations cost the rounding of y and nothing else: W is never rounded to bf16."""
    layer = make_layer(in_features=512)
    x = torch.randn(1, 512).bfloat16()
    weight_t = torch_backend.dequantize(*layer, torch.float32)
    out = cpu.linear(x, *layer[:4], None, layer[4])
    torch.testing.assert_close(out, (x.float() @ weight_t).bfloat16(), rtol=2**-7, atol=1e-5)
    assert out.dtype == torch.bfloat16


def test_threads_do_not_change_the_result(bits, compiled, few_rows, threads):
    layer = make_layer(bits, in_features=172, out_features=1033)
    x, dy = torch.randn(7, 172), torch.randn(7, 1033)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(
            (cpu.linear(x, *layer[:4], None, layer[4]), cpu.weighted_group_grad(dy, x, *layer))
        )
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# ---- compiling


def test_the_library_is_compiled_once(compiled, fresh_cache, monkeypatch):
    assert native.library("dequantize.c") is not None
    assert len(list(fresh_cache.glob("dequantize-*.so"))) == 1
    assert len(list(fresh_cache.iterdir())) == 1  # no scratch files
    native.library.cache_clear()  # as a new process would start

    def refuse(*args, **kwargs):
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert native.library("dequantize.c") is not None


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, compiled, monkeypatch):
    occupied = tmp_path / "file"
    occupied.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    assert build.library.__wrapped__("dequantize.c") is not None


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false"])
def test_without_a_compiler_plain_pytorch_serves(compiler, fresh_cache, few_rows, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    layer = make_layer()
    x, dy = torch.randn(3, 96).bfloat16(), torch.randn(3, 70).bfloat16()
    with pytest.warns(RuntimeWarning, match="Install gcc, or set QALORA_BACKEND=torch"):
        out = cpu.linear(x, *layer[:4], None, layer[4])
    assert torch.equal(out, torch_backend.linear(x, *layer[:4], None, layer[4]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        grad = cpu.weighted_group_grad(dy, x, *layer)
        dx = cpu.grad_input(dy, *layer)
    assert torch.equal(grad, torch_backend.weighted_group_grad(dy, x, *layer))
    assert torch.equal(dx, torch_backend.grad_input(dy, *layer))
    assert list(fresh_cache.glob("*")) == []


# ---- the workspace


def test_workspace_is_reused_and_grows():
    small = workspace((8, 4), torch.bfloat16)
    assert small.shape == (8, 4) and small.dtype == torch.bfloat16
    large = workspace((1 << 12, 1 << 10), torch.float32)
    again = workspace((8, 4), torch.float32)
    assert again.data_ptr() == large.data_ptr() == workspace((1,), torch.bfloat16).data_ptr()


def test_results_do_not_live_in_the_workspace():
    layer = make_layer()
    x = torch.randn(32, 96)
    first = cpu.linear(x, *layer[:4], None, layer[4])
    weight, kept = cpu.dequantize(*layer, torch.float32), first.clone()
    workspace((1 << 16,), torch.float32).fill_(torch.nan)
    assert torch.equal(first, kept)
    assert weight.isfinite().all()


def test_workspace_of_inference_mode_serves_training():
    layer = make_layer(in_features=320, out_features=300)
    done: list[torch.Tensor] = []

    def both():
        with torch.inference_mode():
            cpu.linear(torch.randn(32, 320), *layer[:4], None, layer[4])
        done.append(cpu.grad_input(torch.randn(32, 300), *layer))

    thread = threading.Thread(target=both)  # a thread starts with no workspace
    thread.start()
    thread.join()
    assert not done[0].is_inference()


def test_threads_have_their_own_workspace():
    layers = [make_layer(bits) for bits in (2, 8)]
    x = torch.randn(64, 96)
    expected = [x @ torch_backend.dequantize(*layer, torch.float32) for layer in layers]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(200):
            out = cpu.linear(x, *layers[index][:4], None, layers[index][4])
            if not torch.allclose(out, expected[index], atol=1e-3):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
