"""What a run needs to go on after a kill: which unfinished output is its own."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

from ..files.reader import CheckpointReader


def digest_of(reader: CheckpointReader, data: bytes, **facts: Any) -> str:
    """Hash all that decides what is made of a model to 64 hexadecimal digits.

    Args:
        reader: of the model; its files count by name, size and time of change.
        data: what it is calibrated on; empty for nothing.
        facts: the rest, such as settings and versions.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in reader.files]
    state = {"files": stats, "config": reader.config, **facts}
    text = json.dumps(state, sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + data).hexdigest()


def leftovers(target: Path, partial: Path) -> list[Path]:
    """List unfinished outputs for the same target that other settings, data or sources made."""
    found = target.parent.glob(f".{glob.escape(target.name)}.partial-resume-*")
    return sorted(path for path in found if path != partial)
