"""Import a base in a foreign format: the same integers, scales and offsets in our own format."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import open_quantized
from ..checkpoint.layout import pack_layer
from ..checkpoint.source import sealed_base
from ..errors import ConfigError
from ..files.atomic import AtomicDirectory
from ..files.json import write_json
from ..files.names import CONFIG_FILE
from ..files.writer import write_weights


@dataclass(frozen=True)
class ImportResult:
    """The result of `import_model`.

    Args:
        out: the directory that was made.
        format: of the source.
        layers: number of quantized layers.
        source: what the config says of the source, see `checkpoint.source`.
    """

    out: Path
    format: str
    layers: int
    source: dict[str, Any]


def import_model(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportResult:
    """Convert a quantized base in a foreign format to our own, one layer in memory at a time.

    Nothing is rounded. The result remembers the source and its hash, so that what is merged later
    can be written back into a copy of it (`qalora export --format original`).

    Args:
        source: a directory, a file in a format that is one file, or a Hub id.
        out: directory to make; it must not exist, or be empty.
        revision: branch, tag or commit of the Hub repository.
        progress: called with (tensors written, tensors in all).

    Raises:
        OutputError: the target is not empty, or cannot be written.
        CheckpointError: the source is damaged, or in no format that can be a base.
        ConfigError: it is in our format already.
    """
    target = AtomicDirectory(out)
    checkpoint = open_quantized(source, revision)
    if not checkpoint.is_foreign:
        raise ConfigError(
            f"{checkpoint.directory}: is in our own format already; use it as it is, or copy it"
        )
    copies = {name: (checkpoint.reader, name) for name in checkpoint.dense_names}

    def stored(name: str) -> dict[str, torch.Tensor]:
        return pack_layer(name, checkpoint.layer(name))

    with target as partial:
        write_weights(partial, checkpoint.plan(), copies, stored, progress=progress)
        checkpoint.write_side_files(partial)
        base = sealed_base(checkpoint)
        quantization = checkpoint.config.to_dict() | {"base": base}
        config = checkpoint.reader.config | {"quantization_config": quantization}
        write_json(partial / CONFIG_FILE, config)
    return ImportResult(target.target, checkpoint.format, len(checkpoint.layers), base["source"])
