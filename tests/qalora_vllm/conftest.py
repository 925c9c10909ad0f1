"""Small models on disk."""

from support.directories import base_dir, dense_dir  # noqa: F401
