"""Gather the figures of a run from its files: adapter, base, merged model, trainer's log."""

import importlib.metadata
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.kind import find_kind
from ..errors import ConfigError, QALoRAError
from ..files.digests import file_digest
from ..files.json import read_json
from ..files.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    REPORT_FILE,
)
from ..hub.card import read_log_history, usage_of
from ..merge.adapter import open_adapter, open_base
from ..verify.merge import verify_merge

FIGURES_FILE = "report.json"
_LIBRARIES = ("qalora-plugin", "torch", "transformers", "peft", "trl", "accelerate", "axolotl")
_RECIPE = (
    "base_model_name_or_path", "bits", "group_size", "adapt", "r", "lora_alpha", "lora_dropout",
    "use_rslora", "task_type",
)  # fmt: skip
_GIVEN = ("history", "rows", "samples", "seconds", "memory", "settings", "proof", "merged")
"""What files do not say: it is given when a run ends, and read from its figures later."""


def collect(
    run: Path, *, merged: Path | None = None, verify: bool = False, **given: Any
) -> dict[str, Any]:
    """Return the figures of a run, ready for JSON.

    Args:
        run: directory of a training, or of a quickstart.
        merged: the merged model; by default `run/merged`, or what an earlier report names.
        verify: prove the merge anew, which reads base and merged model.
        given: by the names in `_GIVEN`, what files do not say.

    Returns:
        `recipe`, `versions`, and by what there is: `history` (the trainer's log), `rows` (losses
        in nats a token, sizes in bytes), `changes` (by kind and layer; offsets in steps between two
        integers, scales relative), `quantization_error` (by layer, relative to its output),
        `proof` (an earlier one only of the same `proof_of`, hashes of adapter and merge), `files`
        (sizes in bytes by format), `commands`, `samples`, `seconds`, `memory`.

    Raises:
        ConfigError: there is no adapter in the directory.
        QALoRAError: adapter, base or merged model are damaged, or do not belong together.
    """
    adapter = find_adapter(run)
    earlier = read_json(run / FIGURES_FILE) if (run / FIGURES_FILE).exists() else {}
    figures = {name: earlier[name] for name in _GIVEN if name in earlier} | given
    if not figures.get("history"):
        figures["history"] = _history(run)
    config = read_json(adapter / ADAPTER_CONFIG_FILE)
    recipe = {name: config[name] for name in _RECIPE if config.get(name) is not None}
    figures["recipe"] = recipe | figures.get("settings", {})
    figures["versions"] = _versions()
    merged = merged or Path(figures.get("merged") or run / "merged")
    if (merged / CONFIG_FILE).exists():
        figures["merged"] = str(merged.resolve())
        files = _files(merged)
        figures["files"] = {name: _size(path) for name, path in files.items()}
        figures["commands"] = {name: usage_of(name, path) for name, path in files.items()}
        figures |= _of_base(adapter, merged)
        if verify:
            figures["proof"] = verify_merge(merged, adapter).as_dict()
    figures["proof_of"] = _mark(adapter, merged)
    if not verify and "proof" not in given and figures["proof_of"] != earlier.get("proof_of"):
        figures.pop("proof", None)  # of another adapter, or of another merge
    return figures


def find_adapter(run: Path) -> Path:
    """Return the adapter of a run: in `run/adapter`, in `run`, or in its newest checkpoint.

    Raises:
        ConfigError: there is none.
    """
    for path in (run / "adapter", run, *_checkpoints(run)):
        if (path / ADAPTER_CONFIG_FILE).exists():
            return path
    raise ConfigError(
        f"{run}: expected the directory of a run, with `adapter`, an {ADAPTER_CONFIG_FILE}, or "
        "checkpoints in it, found none. Name the output_dir of the training"
    )


def changes(base: QuantizedCheckpoint, merged: QuantizedCheckpoint) -> dict[str, dict[str, float]]:
    """Measure what merging has changed, by kind and by layer.

    Returns:
        The root mean square over groups and outputs: "offset_change" in steps between two integers
        (scales), "scale_change" relative. A kind in which nothing has changed is left out, and a
        layer whose groups were split.
    """
    found: dict[str, dict[str, float]] = {"offset_change": {}, "scale_change": {}}
    for name in merged.layers:
        before, after = base.layer(name), merged.layer(name)
        if before.scales.shape != after.scales.shape:
            continue
        scales = before.scales.double()
        moved = (after.offsets.double() - before.offsets.double()) / scales
        found["offset_change"][name] = _rms(moved)
        found["scale_change"][name] = _rms(after.scales.double() / scales - 1)
    return {kind: values for kind, values in found.items() if any(values.values())}


def peak_memory() -> dict[str, int]:
    """Return the largest resident memory so far, in bytes.

    That is of this process, of the largest program that it started and that has ended (such as
    llama.cpp) where it took more than this process, and of its GPU if it has one.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    own, other = (
        resource.getrusage(who).ru_maxrss * unit
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    found = {"peak of the process": own}
    # what is said of a child is no less than what this process had when it started the child
    if other > own:
        found["peak of a program that it started"] = other
    if torch.cuda.is_available():
        found["peak of the GPU"] = torch.cuda.max_memory_allocated()
    return found


def _mark(adapter: Path, merged: Path) -> list[str]:
    """Return hashes that tell this adapter and this merge from any other."""
    files = (adapter / ADAPTER_WEIGHTS_FILE, merged / MANIFEST_FILE)
    return [file_digest(file) for file in files if file.is_file()]


def _of_base(adapter: Path, merged: Path) -> dict[str, Any]:
    """Return what is measured against the base; where it is on no disk, why that cannot be."""
    try:
        base = open_base(open_adapter(adapter), None)
    except QALoRAError as error:
        return {"not_measured": str(error)}
    return {
        "changes": changes(base, open_quantized(merged)),
        "quantization_error": _quantization_error(base.directory),
    }


def _rms(x: torch.Tensor) -> float:
    x = x[x.isfinite()]  # a group of equal weights has no step
    return round(x.square().mean().sqrt().item(), 6) if x.numel() else 0.0


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a training, the newest first."""
    named = [(path.name.rpartition("-")[2], path) for path in run.glob("checkpoint-*")]
    return [
        path for _, path in sorted(((int(n), p) for n, p in named if n.isdigit()), reverse=True)
    ]


def _history(run: Path) -> list[dict[str, Any]]:
    for path in (run, *_checkpoints(run)):
        if (path / "trainer_state.json").exists():
            return read_log_history(path / "trainer_state.json")
    return []


def _quantization_error(base: Path) -> dict[str, float]:
    """Return the error of each layer that `qalora quantize` measured; none of other bases."""
    path = base / REPORT_FILE
    layers = read_json(path).get("layers", {}) if path.is_file() else {}
    errors = {name: layer.get("error") for name, layer in layers.items()}
    return {name: error for name, error in errors.items() if error is not None}


def _files(merged: Path) -> dict[str, Path]:
    """Return the merged model and the exports beside it, by format."""
    found = {"qalora": merged}
    beside = sorted(
        [*merged.parent.glob(f"{merged.name}-*"), *merged.parent.glob(f"{merged.name}.*")]
    )
    for path in beside:
        try:
            format = find_kind(path).format
        except QALoRAError:
            continue
        if format is not None:
            found[format.name] = path
    return found


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
