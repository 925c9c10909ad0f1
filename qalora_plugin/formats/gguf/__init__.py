"""GGUF files for llama.cpp and all that is built on it."""

from ...checkpoint.format import Format

FORMAT = Format(name="gguf", package=__name__)
