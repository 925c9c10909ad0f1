"""Prove that an export holds the weights of the model it was made from.

Every layer is dequantized by the library of the runtime that the format is for, and compared with
W = scales * (q - mid) + offsets in float64, weight by weight, within the rounding that the format
forces and no more. Then the runtime itself runs it, where it is installed.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import open_quantized
from ..checkpoint.format import Format, format_named
from ..checkpoint.kind import find_kind
from ..errors import CheckpointError, ConfigError, VerificationError
from ..files.manifest import check_manifest
from ..formats.export import Progress
from ..formats.record import read_record
from ..formats.weights import ExactWeight, ExportedWeights
from .runtime import RuntimeReport, check_runtime


@dataclass(frozen=True)
class ExportReport:
    """The comparison of an export with its source. A report exists only where everything held.

    Args:
        exported: the directory or file.
        format: what it is.
        layers: layers whose weights are equal, within the format's rounding.
        other_tensors: other tensors that are equal, bit for bit in fp32.
        unchecked: tensors that the export holds together with others, and that were not compared.
        largest_error: of a weight, in steps (scales) of its group; for lora relative.
        runtime: what the runtime computes, or why it was not run; None if it was not asked for.
    """

    exported: str
    format: str
    layers: int
    other_tensors: int
    unchecked: int
    largest_error: float
    runtime: RuntimeReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """Return a few lines for people."""
        of_adapter = format_named(self.format).of_adapter
        unit = "of the largest change" if of_adapter else "of a step"
        largest = f"largest difference {self.largest_error:.1e} {unit}"
        text = (
            f"{self.exported}: verified, format {self.format}: {self.layers} layers are equal "
            f"({largest if self.largest_error else 'bit for bit'}), {self.other_tensors} other "
            "tensors are equal"
        )
        text += f", {self.unchecked} were not compared" if self.unchecked else ""
        return text if self.runtime is None else f"{text}\n{self.runtime.as_text()}"


def verify_export(
    exported: str | Path,
    against: str | Path,
    base: str | Path | None = None,
    *,
    run: bool = False,
    python: str | Path | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Compare an export with the model it was made from.

    Args:
        exported: what `export_model` wrote.
        against: the merged model; for a lora export the adapter.
        base: of a lora export: the adapter's quantized base, by default what its config names.
        run: also run it in its runtime, and compare logits with ours.
        python: interpreter that has the runtime, by default this one.
        progress: called with (tensors compared, tensors in all).

    Raises:
        VerificationError: a tensor is missing, or differs by more than the format's rounding; or
            the runtime computes something else.
        CheckpointError, AdapterError: one of the two is damaged.
        ConfigError: the library of the format is not installed, or `base` for another format.
    """
    path = Path(exported)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory. Name what was exported.")
    if path.is_dir():
        check_manifest(path)
    format = find_kind(path).format
    if format is None:
        raise CheckpointError(
            f"{exported}: not what `qalora export` writes. To compare a merged model with base and "
            "adapter, name the adapter with --adapter."
        )
    if format.of_adapter:
        layers, other, worst = format.module("weights").compare(path, against, base, progress)
        report = ExportReport(str(path), format.name, layers, other, 0, worst)
    elif base is not None:
        raise ConfigError(
            f"{exported}: is in format {format.name!r}, which is compared with the merged model "
            "alone; leave out base (--base)"
        )
    else:
        report = _verify_weights(path, against, format, progress)
    if not run:
        return report
    return dataclasses.replace(report, runtime=check_runtime(path, against, format, python, base))


def _verify_weights(
    path: Path, against: str | Path, format: Format, progress: Progress | None
) -> ExportReport:
    source = open_quantized(against)
    record = read_record(path) if path.is_dir() else None
    if record and record.get("measured") and path.resolve() != source.directory.resolve():
        raise VerificationError(
            f"{path}: its weights are not those of the merged model. {record['exactness']} What "
            f"it holds is compared with its runtime by `qalora verify {path} --against {path}`."
        )
    weights: ExportedWeights = format.module("weights").Weights(path, source)
    layers = {f"{name}.weight": name for name in source.layers}
    names = [*layers, *source.dense_names]

    def dense(layer: str) -> bool:
        return bool(format.grids.obstacle(source.layers[layer], source.config.desc_act))

    largest, unchecked, equal = 0.0, 0, 0
    for done, name in enumerate(names, start=1):
        found = weights.get(name)
        if found is None and name in layers and not dense(layers[name]):
            raise weights.missing(name, "a tensor")
        if found is None:
            unchecked += 1
        elif name in layers:
            equal += 1
            exact = ExactWeight(source.layer(layers[name]))
            error = _layer_error(weights, name, found, exact, format.name)
            largest = max(largest, error)
        elif not torch.equal(found.float(), source.reader.get(name).float()):
            raise VerificationError(f"{path}: {name} differs from that of {source.directory}.")
        if progress is not None:
            progress(done, len(names))
    other = len(names) - unchecked - equal
    return ExportReport(str(path), format.name, equal, other, unchecked, largest)


def _layer_error(
    weights: ExportedWeights, name: str, found: torch.Tensor, exact: ExactWeight, format: str
) -> float:
    """Compare one weight [N, K], and return the largest difference in steps."""
    if found.shape != exact.values.shape:
        raise VerificationError(
            f"{weights.exported}: {name}: shape {list(found.shape)}, expected "
            f"{list(exact.values.shape)}."
        )
    difference = (found.double() - exact.values).abs()
    steps = exact.steps.where(exact.steps != 0, 1.0)  # one weight in the whole group
    worst = (difference / steps).max().item()
    wrong = ~(difference <= weights.rounding(name, exact))  # NaN is wrong too
    if wrong.any():
        raise VerificationError(
            f"{weights.exported}: {name}: {int(wrong.sum())} of {wrong.numel()} weights differ by "
            f"more than the rounding of {weights.kind(name) or format} (up to {worst:.3g} of a "
            "step). It is of another model, or damaged."
        )
    return worst
