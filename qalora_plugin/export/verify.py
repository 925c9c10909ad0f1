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
from peft import LoraConfig

from qalora_kernels import QuantSpec
from qalora_kernels.groups import expand, group_index

from ..adapter import CONFIG_FILE as ADAPTER_CONFIG
from ..adapter import PREFIX, WEIGHTS_FILE
from ..additive import dense
from ..checkpoint.base import LayerTensors, open_quantized
from ..checkpoint.reader import CONFIG_FILE, read_json
from ..errors import CheckpointError, ConfigError, VerificationError
from ..merge import plan_merge
from . import readers
from .onnx import MODEL_FILE
from .record import read_record
from .runtimes import RuntimeReport, check_runtime
from .walk import Progress

_FP32, _F16 = 2.0**-22, 2.0**-11  # of the largest number that is rounded
_F16_SUBNORMAL = 2.0**-25


@dataclass(frozen=True)
class ExportReport:
    """What was compared. A report exists only where everything held.

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
        """For JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """For people."""
        unit = "of the largest change" if self.format == "lora" else "of a step"
        largest = f"largest difference {self.largest_error:.1e} {unit}"
        text = (
            f"{self.exported}: verified, format {self.format}: {self.layers} layers are equal "
            f"({largest if self.largest_error else 'bit for bit'}), {self.other_tensors} other "
            "tensors are equal"
        )
        text += f", {self.unchecked} were not compared" if self.unchecked else ""
        return text if self.runtime is None else f"{text}\n{self.runtime.as_text()}"


def find_format(exported: Path) -> str:
    """The format of an export, from what is there.

    Raises:
        CheckpointError: it is none.
    """
    if exported.is_file() and exported.suffix == ".gguf":
        return "gguf"
    if (exported / ADAPTER_CONFIG).exists():
        return "lora"
    if (exported / MODEL_FILE).exists():
        return "onnx"
    config = read_json(exported / CONFIG_FILE)
    if "quantization" in config:
        return "mlx"
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in ("torchao", "gptq"):
        return str(method)
    raise CheckpointError(
        f"{exported}: not what `qalora export` writes (quant_method {method!r}). To compare a "
        "merged model with base and adapter, name the adapter with --adapter."
    )


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
    format = find_format(path)
    if format == "lora":
        report = _verify_lora(path, against, base, progress)
    elif base is not None:
        raise ConfigError(
            f"{exported}: is in format {format!r}, which is compared with the merged model alone; "
            "leave out base (--base)"
        )
    else:
        report = _verify_weights(path, against, format, progress)
    if not run:
        return report
    return dataclasses.replace(report, runtime=check_runtime(path, against, format, python, base))


def _verify_weights(
    path: Path, against: str | Path, format: str, progress: Progress | None
) -> ExportReport:
    """Compare all tensors."""
    source = open_quantized(against)
    if path.resolve() != source.directory.resolve():
        _check_not_requantized(path)
    read = getattr(readers, format)(path, source)
    kinds = readers.gguf_kinds(path, source) if format == "gguf" else {}
    names = [*(f"{name}.weight" for name in source.layers), *source.dense_names]
    largest, unchecked, layers = 0.0, 0, 0
    for done, name in enumerate(names, start=1):
        found = read(name)
        layer = name.removesuffix(".weight")
        if found is None:
            unchecked += 1
        elif layer != name and layer in source.layers:
            layers += 1
            tensors, spec = source.layer(layer), source.layers[layer]
            kind = kinds.get(name, format)
            largest = max(largest, _check_layer(path, name, found, tensors, spec, kind))
        elif not torch.equal(found.float(), source.reader.get(name).float()):
            raise VerificationError(f"{path}: {name} differs from that of {source.directory}.")
        if progress is not None:
            progress(done, len(names))
    other = len(names) - unchecked - layers
    return ExportReport(str(path), format, layers, other, unchecked, largest)


def _check_not_requantized(path: Path) -> None:
    """An export by --requantize has other weights, and says what that costs.

    Raises:
        VerificationError: this is one.
    """
    record = read_record(path) if path.is_dir() else None
    if record is not None and record.get("measured"):
        raise VerificationError(
            f"{path}: its weights are not those of the merged model. {record['exactness']} What "
            f"it holds is compared with its runtime by `qalora verify {path} --against {path}`."
        )


def _check_layer(
    path: Path,
    name: str,
    found: torch.Tensor,
    layer: LayerTensors,
    spec: QuantSpec,
    kind: str,
) -> float:
    """Compare one weight; the largest difference in steps. `kind` is a format or GGUF's type."""
    exact = dense(layer, spec).t()
    if found.shape != exact.shape:
        raise VerificationError(
            f"{path}: {name}: shape {list(found.shape)}, expected {list(exact.shape)}."
        )
    step, offset = (
        expand(values, layer.g_idx, spec.group_size, spec.in_features).t().double()
        for values in (layer.scales, layer.offsets)
    )
    bound = _FP32 * (offset.abs() + step * 2**spec.bits)
    if kind == "Q4_1" and spec.minimum_below is None:  # else minima are f16; codes go up to 15
        bound = _F16 * (offset.abs() + step * 16)
    elif kind == "F16":
        bound = _F16 * exact.abs() + _F16_SUBNORMAL
    difference = (found.double() - exact).abs()
    worst = (difference / step).max().item()
    if not (difference <= bound).all():  # NaN fails this too
        wrong = int((~(difference <= bound)).sum())
        raise VerificationError(
            f"{path}: {name}: {wrong} of {exact.numel()} weights differ by more than the rounding "
            f"of {kind} (up to {worst:.3g} of a step). It is of another model, or damaged."
        )
    return worst


def _verify_lora(
    exported: Path, against: str | Path, base: str | Path | None, progress: Progress | None
) -> ExportReport:
    """Compare the change of each weight with the change of offsets by the adapter."""
    from safetensors import safe_open

    plan = plan_merge(against, base)
    config = LoraConfig.from_pretrained(exported)
    worst = 0.0
    with safe_open(exported / WEIGHTS_FILE, framework="pt") as file:
        keys = set(file.keys())
        for done, (name, merge) in enumerate(plan.layers.items(), start=1):
            start = f"{PREFIX}{plan.adapter.trained_name(name)}.lora_"
            if not {f"{start}A.weight", f"{start}B.weight"} <= keys:
                raise VerificationError(f"{exported}: no {start}A.weight and {start}B.weight.")
            a, b = (file.get_tensor(f"{start}{part}.weight").double() for part in "AB")
            spec = merge.merged_spec
            change = merge.change(plan.adapter, "zeros")
            assert change is not None
            g_idx = plan.base.reader.get(f"{name}.g_idx") if plan.base.config.desc_act else None
            index = group_index(g_idx, spec.group_size, spec.in_features, a.device).long()
            expected = change.delta().t()[:, index]
            found = merge.layer.scaling * (b @ a)
            if found.shape != expected.shape:
                raise VerificationError(f"{exported}: {name}: of another shape than the base.")
            error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
            if not error <= 1e-6:
                raise VerificationError(
                    f"{exported}: {name}: changes weights by something else than the adapter "
                    f"{against} (by {error:.3g} of the largest change)."
                )
            worst = max(worst, error)
            if progress is not None:
                progress(done, len(plan.layers))
    stated = (config.r, config.lora_alpha, config.use_rslora)
    wanted = tuple(plan.adapter.config.get(k) or False for k in ("r", "lora_alpha", "use_rslora"))
    if stated != wanted:
        raise VerificationError(
            f"{exported}: {stated} as r, lora_alpha, use_rslora, expected {wanted}."
        )
    return ExportReport(str(exported), "lora", len(plan.layers), 0, 0, worst)
