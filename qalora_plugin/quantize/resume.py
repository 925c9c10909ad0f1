"""Going on after a kill: which unfinished output belongs to the same work, and what it knows."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files.atomic import replace_text
from ..files.json import json_text, read_json
from ..files.names import CONFIG_FILE, REPORT_FILE
from ..files.reader import CheckpointReader

_TAG_DIGITS = 16


def resume_tag(
    settings: dict[str, Any], reader: CheckpointReader, windows: torch.Tensor | None
) -> str:
    """Hash all that decides the result: settings, the source's files, data, versions.

    Args:
        settings: JSON-able.
        reader: of the source; its files count by name, size and time of change.
        windows: calibration token ids int64 [samples, seq_len], or None.
    """
    files = sorted({info.file for info in reader.tensors.values()})
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    state = {
        "settings": settings,
        "files": stats,
        "config": read_json(reader.directory / CONFIG_FILE),
        "versions": [torch.__version__, transformers.__version__],
    }
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    if windows is not None:
        digest.update(windows.numpy().tobytes())
    return digest.hexdigest()[:_TAG_DIGITS]


def leftovers(target: Path, partial: Path) -> list[Path]:
    """List unfinished outputs for the same target that other settings, data or sources made."""
    found = target.parent.glob(f".{glob.escape(target.name)}.partial-resume-*")
    return sorted(path for path in found if path != partial)


class Report:
    """quantization_report.json: each layer's grid and error, kept in the output directory.

    Attributes:
        layers: {name: {"bits", "group_size", "error"}}; the error is relative to the layer's
            output on the calibration inputs (see `gptq.calibrated_error`), None for a data-free
            layer, or one that puts out zeros.
    """

    def __init__(self, directory: Path) -> None:
        """Start from what an earlier run left, if it did."""
        self._path = directory / REPORT_FILE
        self.layers: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self.layers = read_json(self._path)["layers"]

    def save(self) -> None:
        """Write the file, which is whole at any time."""
        replace_text(self._path, json_text({"layers": self.layers}))
