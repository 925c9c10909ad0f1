"""Directories that stock transformers loads with torchao."""

from ...checkpoint.format import Format

FORMAT = Format(name="torchao", package=__name__)
