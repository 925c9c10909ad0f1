"""Small models on disk."""

from support.directories import altered, base_dir, dense_dir  # noqa: F401
