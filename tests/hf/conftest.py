"""Small models on disk, quantized and not."""

from support.directories import altered, base_dir, dense_dir  # noqa: F401
