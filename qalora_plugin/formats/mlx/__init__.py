"""Directories that mlx-lm loads."""

from ...checkpoint.format import Format

FORMAT = Format(name="mlx", package=__name__)
