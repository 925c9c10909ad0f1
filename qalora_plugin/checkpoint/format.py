"""`Format`: the record of a foreign format, and the registry of those that are known.

The formats themselves live above, one folder each in `qalora_plugin.formats`, which registers them
here. So what is below (loading, quantizing, merging) can open a foreign base, and write a foreign
result, without importing any format.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import QALoRAQuantConfig


@dataclass(frozen=True)
class Format:
    """What is known of one foreign format before any of its code is imported.

    Args:
        name: as `--format` takes it.
        package: dotted name of the format's folder, whose modules are imported on first use.
        quant_methods: values of config.json's `quant_method` that mark a base in this format; empty
            where the format cannot be a base. Such a format has a module `read` with
            `parse_config(raw, path) -> QALoRAQuantConfig` and
            `open_checkpoint(directory) -> QuantizedCheckpoint`.
        marker: name of a file that marks a base where config.json says nothing.
    """

    name: str
    package: str
    quant_methods: tuple[str, ...] = ()
    marker: str | None = None

    def module(self, part: str) -> Any:
        """Import one module of the format's folder, such as "read" or "write"."""
        return importlib.import_module(f"{self.package}.{part}")

    def is_base(self, quantization_config: Any, directory: Path | None = None) -> bool:
        """Say whether a config.json's `quantization_config`, or else a file, marks this format."""
        if isinstance(quantization_config, dict):
            return quantization_config.get("quant_method") in self.quant_methods
        unmarked = quantization_config is not None or self.marker is None or directory is None
        return not unmarked and (directory / self.marker).exists()


_FORMATS: dict[str, Format] = {}


def register_format(format: Format) -> None:
    """Make a format known under its name; a second call with the same one changes nothing."""
    _FORMATS[format.name] = format


def formats() -> Iterator[Format]:
    """Yield every known format, in the order of registration."""
    yield from _FORMATS.values()


def format_named(name: str) -> Format:
    """Return the format of this name.

    Raises:
        ConfigError: no format has this name.
    """
    if name not in _FORMATS:
        raise ConfigError(f"format: expected one of {', '.join(_FORMATS)}, found {name!r}")
    return _FORMATS[name]


def base_format(quantization_config: Any, directory: Path | None = None) -> Format | None:
    """Return the foreign format in which a model is quantized, None where it is none of them."""
    found = (f for f in formats() if f.is_base(quantization_config, directory))
    return next(found, None)


def foreign_config(quantization_config: Any, path: Path) -> QALoRAQuantConfig | None:
    """Return our config of a base in a foreign format, from its `quantization_config` alone.

    Args:
        quantization_config: of config.json.
        path: of config.json, for messages.

    Returns:
        None where no registered format reads it.

    Raises:
        CheckpointError: its format is known, but names an option that is not read.
    """
    found = base_format(quantization_config)
    return None if found is None else found.module("read").parse_config(quantization_config, path)
