"""Small models on disk, quantized and not, and those that other programs wrote."""

from pathlib import Path

from support.directories import altered, base_dir, dense_dir  # noqa: F401

FIXTURES = Path(__file__).parent.parent / "fixtures"
STOCK = sorted(path for path in FIXTURES.glob("gptq_*"))
