"""Import a base in a foreign format: the same integers, scales and offsets in our own format."""

import fcntl
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import cache

from ..errors import ConfigError, OutputError
from ..files.atomic import AtomicDirectory
from ..files.json import write_json
from ..files.manifest import checked_beside
from ..files.names import CONFIG_FILE
from ..files.writer import bound_to, write_weights
from .checkpoint import open_quantized
from .layout import pack_layer
from .source import hash_files, sealed_base

_log = logging.getLogger(__name__)


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
    """Convert a quantized base in a foreign format to our own, a few layers in memory at a time.

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

    quantization = checkpoint.config.to_dict()
    config = checkpoint.reader.config | {"quantization_config": quantization}
    hashed = checked_beside(checkpoint.directory, lambda _: hash_files(checkpoint))
    with target as partial:
        with hashed:
            plan, metadata = checkpoint.plan(), bound_to(config)
            write_weights(partial, plan, copies, stored, metadata=metadata, progress=progress)
        checkpoint.write_side_files(partial)
        base = sealed_base(checkpoint)
        final = config | {"quantization_config": quantization | {"base": base}}
        write_json(partial / CONFIG_FILE, final)
    return ImportResult(target.target, checkpoint.format, len(checkpoint.layers), base["source"])


def cached_import(path: Path) -> Path:
    """Return the directory of an imported file, made on first use in the user's cache directory.

    Args:
        path: a file in a format that is one file; its size and time of change count.

    Raises:
        CheckpointError: see `import_model`.
        OutputError: the cache cannot be written.
    """
    stat = path.stat()
    facts = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:12]
    try:
        directory = cache.private_directory("bases") / f"{path.stem}-{key}"
        with directory.with_name(f".{directory.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes one imports
            if not (directory / CONFIG_FILE).exists():
                _log.warning("importing %s into %s, once", path, directory)
                import_model(path, directory)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path}: cannot be imported into the cache directory ({error}). Run `qalora import "
            f"{path} --out DIR`, and give DIR."
        ) from error
    return directory
