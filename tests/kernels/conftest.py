"""Layers of awkward shapes, the backends, and the rule that every operator is held to."""

import functools
import os

import pytest
import torch

from qalora_kernels import PackedWeight, QuantSpec

CUDA = torch.cuda.is_available()
if not CUDA:  # before anything imports triton; tests/conftest.py does it for runs of all tests
    os.environ.setdefault("TRITON_INTERPRET", "1")

# in_features, group_size, act_order; 172 is a multiple of no group size and of no packed unit
LAYOUTS = {
    "even": (128, 32, False),
    "short_last_group": (172, 32, False),
    "group_across_words": (172, 24, False),
    "one_group": (172, -1, False),
    "act_order": (172, 32, True),
}
# every width, layout and dtype; every width in a dtype that Triton's interpreter has
CASES = [
    (2, "group_across_words", torch.float32),
    (3, "short_last_group", torch.float16),
    (3, "act_order", torch.float32),
    (4, "even", torch.float16),
    (4, "act_order", torch.bfloat16),
    (8, "one_group", torch.float16),
]


def case_id(case):
    return "-".join([f"{case[0]}bit", case[1], str(case[2])[6:]])


@pytest.fixture
def device():
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request, monkeypatch):
    """Each test runs on every backend; Triton on the CPU is its interpreter."""
    if request.param == "cpu":
        if CUDA:
            pytest.skip("the cpu backend refuses CUDA tensors; without a GPU this test runs on it")
        monkeypatch.setattr("qalora_kernels.backends.cpu.FEW_ROWS_WEIGHTS", 0)
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("QALORA_TUNING_CACHE", "off")
    monkeypatch.setenv("QALORA_BACKEND", request.param)
    return request.param


@pytest.fixture(params=CASES, ids=case_id)
def case(request, backend):
    """(bits, layout, dtype) on each backend."""
    if request.param[2] == torch.bfloat16 and not CUDA and backend == "triton":
        pytest.skip("Triton's interpreter multiplies bf16 wrongly: needs a CUDA device")
    return request.param


@pytest.fixture
def layouts():
    """Every layout with a number of bits of its own."""
    return [(bits, layout) for bits, layout, _ in CASES]


@pytest.fixture(params=[2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def bits(request):
    return request.param


@pytest.fixture
def fresh_library(tmp_path, monkeypatch):
    """Nothing compiled yet; what other tests have loaded comes back afterwards."""
    from qalora_kernels.backends.cpu import build, native

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = functools.cache(build.library.__wrapped__)
    monkeypatch.setattr(native, "library", library)
    return library


@pytest.fixture
def make_weight(device):
    """Makes a `PackedWeight` of random numbers, scales and offsets in fp32 that fp16 holds."""

    def make(bits, layout="short_last_group", out_features=37):
        in_features, group_size, act_order = LAYOUTS[layout]
        spec = QuantSpec(bits, group_size, in_features, out_features)
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
        grid = (spec.num_groups, out_features)
        scales = torch.rand(grid, generator=generator) * 0.1 / (1 << bits) + 0.01
        scales[:, 1::2] *= -1  # as MLX has them
        scales[0, :2] = 0  # as GGUF has them
        offsets = torch.randn(grid, generator=generator) * 0.05
        g_idx = None
        if act_order:
            order = torch.randperm(in_features, generator=generator)
            g_idx = (order // spec.group_size).to(device)
        grid = (values.half().float().to(device) for values in (scales, offsets))
        return PackedWeight.from_codes(codes.t().to(device), *grid, g_idx, spec)

    return make


@pytest.fixture
def randn(device):
    """Draws normal numbers, the same on every device for the same shape."""

    def draw(*shape, dtype=torch.float32, scale=1.0):
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    return draw


@pytest.fixture
def assert_as_good_as():
    """Liger-Kernel's rule: at most twice the error of plain PyTorch in the same dtype."""

    def check(ours, plain, exact):
        assert exact.dtype == torch.float64
        assert ours.shape == exact.shape
        error = (ours.double() - exact).norm().item()
        allowed = 2 * (plain.double() - exact).norm().item()
        # a few numbers may be exact in plain PyTorch by luck: a quarter of the dtype's step, and
        # the noise of a sum in fp32
        luck = torch.finfo(plain.dtype).eps / 4 + 2 * torch.finfo(torch.float32).eps
        allowed += luck * exact.norm().item()
        assert error <= allowed, f"error {error:.3e}, plain PyTorch allows {allowed:.3e}"

    return check
