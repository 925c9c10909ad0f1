"""What a run needs to go on after a kill: which unfinished output is its own, and its report."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from ..files.atomic import replace_text
from ..files.json import json_text, read_json
from ..files.names import REPORT_FILE
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
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in reader.files]
    state = {
        "settings": settings,
        "files": stats,
        "config": reader.config,
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
        layers: see `pipeline.QuantizeResult`; what an earlier run left is there from the start.
    """

    def __init__(self, directory: Path) -> None:
        """Read the file, if it is there."""
        self._path = directory / REPORT_FILE
        found = read_json(self._path) if self._path.exists() else {"layers": {}}
        self.layers: dict[str, dict[str, Any]] = found["layers"]

    def save(self) -> None:
        """Write the file, which is whole at any time."""
        replace_text(self._path, json_text({"layers": self.layers}))
