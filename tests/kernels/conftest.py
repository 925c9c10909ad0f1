"""Layers of awkward shapes, the backends, and the rule that every operator is held to."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from qalora_kernels import QuantSpec, pack, reference

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


@dataclass
class Layer:
    spec: QuantSpec
    qweight: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    g_idx: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.qweight, self.scales, self.offsets, self.g_idx

    def weight_t(self, dtype: torch.dtype) -> torch.Tensor:
        """W^T [K, N] by the dense formula, in fp64 for fp64 and else rounded once from fp32."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        spec = self.spec
        dense = reference.dequantize(
            self.qweight,
            self.scales.to(compute),
            self.offsets.to(compute),
            self.g_idx,
            spec.bits,
            spec.group_size,
            spec.in_features,
        )
        return dense.to(dtype)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on every backend; Triton on the CPU is its interpreter."""
    if request.param == "cpu":
        if CUDA:
            pytest.skip("the cpu backend refuses CUDA tensors; without a GPU this test runs on it")
        monkeypatch.setattr("qalora_kernels.cpu.FEW_ROWS_WEIGHTS", 0)
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        monkeypatch.setenv("QALORA_TUNING_CACHE", "off")
    monkeypatch.setenv("QALORA_BACKEND", request.param)
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == torch.bfloat16 and not CUDA and "triton" in request.node.callspec.id:
        pytest.skip("Triton's interpreter multiplies bf16 wrongly: needs a CUDA device")
    return request.param


@pytest.fixture(params=[2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make_layer(device: torch.device) -> Callable[..., Layer]:
    def make(bits: int, layout: str = "short_last_group", out_features: int = 37) -> Layer:
        in_features, group_size, act_order = LAYOUTS[layout]
        spec = QuantSpec(bits, group_size, in_features, out_features)
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(0, 1 << bits, (in_features, out_features), generator=generator)
        grid = (spec.num_groups, out_features)
        scales = torch.rand(grid, generator=generator) * 0.1 / (1 << bits) + 0.01
        offsets = torch.randn(grid, generator=generator) * 0.05
        g_idx = None
        if act_order:
            order = torch.randperm(in_features, generator=generator)
            g_idx = (order // spec.group_size).int().to(device)
        return Layer(
            spec,
            pack(codes, bits).to(device),
            scales.half().float().to(device),
            offsets.half().float().to(device),
            g_idx,
        )

    return make


@pytest.fixture
def randn(device: torch.device) -> Callable[..., torch.Tensor]:
    """Normal numbers, the same on every device for the same shape."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(device)

    return draw


@pytest.fixture
def assert_as_good_as() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Liger-Kernel's rule: at most twice the error of plain PyTorch in the same dtype."""

    def check(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
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
