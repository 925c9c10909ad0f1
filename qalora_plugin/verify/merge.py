"""Prove that a merged checkpoint is its base with its adapter, and say how far the proof goes.

1. Tensors. The merge is planned anew from base and adapter, and every tensor of the merged
   checkpoint compared bit for bit with what that gives.
2. Outputs. Each adapted layer is run on random inputs in float64, as the merged layer and as base
   plus adapter by the additive formula of the code that trained the adapter (`additive`, which
   shares nothing with the merge). They may differ by the rounding of the stored scales and
   offsets, a bound that is computed, and by nothing else.
3. The convention. 1 and 2 use the convention that the adapter's own config states. Where the
   config is silent (the authors' released code) they can only show that the merge did what it
   declares; whether the declaration is true needs what that code computed: `reference`.
4. Logits, on request (`logits`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight
from qalora_kernels import reference as formula
from qalora_kernels.groups import expand

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..errors import VerificationError
from ..files.manifest import check_manifest
from ..files.names import CONFIG_FILE, MANIFEST_FILE
from ..formats.weights import ExactWeight
from ..merge.adapter import open_adapter, open_base
from ..merge.pairing import LayerMerge
from ..merge.plan import MergePlan, make_plan
from .additive import added_output
from .logits import LogitsReport, compare_logits, compare_reference, read_reference

_ROWS = 4  # random inputs a layer
_COLUMNS = 1024  # outputs held in float64 at a time


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The comparison of a merge with base and adapter. A report exists only where everything held.

    Args:
        merged: the merged directory.
        layers: adapted layers.
        unadapted_layers: quantized layers that no adapter touches, equal to the base's.
        other_tensors: tensors outside of quantized layers, equal to the base's.
        modules_to_save: tensors that equal the adapter's.
        max_difference: of scales and offsets from the recomputed ones: always 0.0, since one that
            differs by a bit is an error and no report.
        integers_equal: always true for the same reason: qweight and g_idx are the base's.
        hashes: whether the directory has a manifest, whose hashes then hold.
        convention: how the adapter pools.
        convention_from: "adapter config", "reference" (measured), or "declaration": stated when
            merging, and not provable from the adapter alone.
        output_error: largest difference between merged and additive outputs, as a share of what
            the rounding of scales and offsets allows.
        output_change: largest change of an output by the adapter, in the same unit.
        logits: of the whole models, if asked for.
    """

    merged: str
    layers: int
    unadapted_layers: int
    other_tensors: int
    modules_to_save: int
    max_difference: float = 0.0
    integers_equal: bool = True
    hashes: bool
    convention: str
    convention_from: str
    output_error: float
    output_change: float
    logits: LogitsReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """Return a few lines for people."""
        lines = [
            f"{self.merged}: verified",
            f"  {self.layers} adapted layers: integers equal the base's, scales and offsets equal "
            "the recomputed ones, bit for bit",
            f"  {self.unadapted_layers} other quantized layers and {self.other_tensors} other "
            f"tensors equal the base's; {self.modules_to_save} equal the adapter's",
            f"  merged against additive outputs, float64: {self.output_error:.2g} of what rounding "
            f"allows (the adapter changes outputs by {self.output_change:.2g} of it)",
            f"  convention {self.convention!r}, from: {self.convention_from}",
        ]
        if self.convention_from == "declaration":
            lines.append(
                "  NOT PROVEN: the adapter's config does not say how it pools. To prove it, save "
                "input_ids and logits from the code that trained it, and give --reference FILE."
            )
        if not self.hashes:
            lines.append(f"  no {MANIFEST_FILE}: file hashes not checked")
        if self.logits is not None:
            lines.append("  " + self.logits.as_text())
        return "\n".join(lines)


def verify_merge(
    merged: str | Path,
    adapter: str | Path,
    base: str | Path | None = None,
    *,
    logits: bool = False,
    reference: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare a merged checkpoint with its base and its adapter.

    Args:
        merged: directory that `merge_adapter` or `MergeCallback` wrote.
        adapter: the adapter that was merged.
        base: the quantized base; by default what the adapter's config names.
        logits: also build both models and compare their logits.
        reference: a .safetensors file with `input_ids` int64 [B, T] and `logits` [B, T, V] that
            base and adapter gave in the code that trained the adapter; also builds both models.
        progress: called with (layers compared, layers in all).

    Raises:
        VerificationError: the merged checkpoint is not what base and adapter make.
        AdapterError, CheckpointError: one of the three is damaged, or does not belong here.
    """
    known = None if reference is None else read_reference(Path(reference))
    result = open_quantized(merged)
    declared = result.config.merged
    if declared is None:
        raise VerificationError(
            f"{result.directory}: its quantization_config says nothing of a merge: it is a base. "
            "Give what `qalora merge` wrote; what `qalora export` wrote is compared by --against."
        )
    if "adapters" in declared:
        raise VerificationError(
            f"{result.directory}: {len(declared['adapters'])} adapters were merged into it in one "
            f"step ({declared.get('adapter')}), and what one of them gives is not there by itself. "
            "Merge one alone, with `qalora merge`, to verify it."
        )
    used, opened = str(declared.get("convention")), open_adapter(adapter)
    stated = opened.stated_convention()
    if stated is not None and stated != used:
        raise VerificationError(
            f"{result.directory}: merged with the convention {used!r}, but the adapter's config "
            f"says that it was trained with {stated!r}: every change is off by a constant factor. "
            "Merge again without --convention."
        )
    # the merge as it should have been
    plan = make_plan(opened, open_base(opened, base), opened.convention(used))
    hashes = check_manifest(result.directory)
    _check_names(plan, result)
    _check_grids(plan, result)
    _check_dense(plan, result)
    error = change = 0.0
    for done, name in enumerate(plan.base.layers, start=1):
        _check_layer(plan, result, name)
        if name in plan.layers:
            layer_error, layer_change = _check_outputs(plan, result, name)
            error, change = max(error, layer_error), max(change, layer_change)
        if progress is not None:
            progress(done, len(plan.base.layers))
    source = "declaration" if stated is None else "adapter config"
    logits_report = compare_logits(plan, result) if logits else None
    if known is not None:
        compare_reference(plan, result, known)
        source = "reference"
    return VerifyReport(
        merged=str(result.directory),
        layers=len(plan.layers),
        unadapted_layers=len(plan.base.layers) - len(plan.layers),
        other_tensors=len(plan.dense.from_base),
        modules_to_save=len(plan.dense.from_adapter),
        hashes=hashes,
        convention=plan.convention,
        convention_from=source,
        output_error=error,
        output_change=change,
        logits=logits_report,
    )


def _wrong(result: QuantizedCheckpoint, tensor: str, how: str) -> VerificationError:
    return VerificationError(f"{result.reader.info(tensor).file}: {tensor}{how}")


def _check_names(plan: MergePlan, result: QuantizedCheckpoint) -> None:
    tensors = result.reader.tensors
    for name in sorted(tensors.keys() ^ plan.tensors.keys()):
        what = "missing" if name in plan.tensors else "not one that base and adapter give"
        raise VerificationError(f"{result.directory}: tensor {name} is {what}.")
    for name, expected in plan.tensors.items():
        found = (tensors[name].dtype, tensors[name].shape)
        if found != expected:
            raise _wrong(
                result,
                name,
                f": expected {expected} as base and adapter give, found {found}. It was merged "
                "from others.",
            )


def _check_grids(plan: MergePlan, result: QuantizedCheckpoint) -> None:
    """Compare the grids that config.json gives: tensors of other groups may have the same shape."""
    for name, spec in plan.base.layers.items():
        wanted = plan.layers[name].merged_spec if name in plan.layers else spec
        for field in ("bits", "group_size", "offsets_at"):
            expected, found = (getattr(s, field) for s in (wanted, result.layers[name]))
            if found != expected:
                raise VerificationError(
                    f"{result.directory / CONFIG_FILE}: {field} of {name}: expected {expected!r} "
                    f"as base and adapter give, found {found!r}. It was changed: merge again."
                )


def _check_dense(plan: MergePlan, result: QuantizedCheckpoint) -> None:
    """Compare what is outside of quantized layers with base and adapter, bit for bit."""
    for name, key in plan.dense.from_adapter.items():
        if not _equal(plan.adapter.get(key), result.reader.get(name)):
            raise _wrong(result, name, " differs from the adapter's. Merge again.")
    for name, original in plan.dense.from_base.items():
        pieces = zip(plan.base.reader.chunks(original), result.reader.chunks(name), strict=True)
        if not all(a == b for a, b in pieces):
            raise _wrong(result, name, " differs from the base's. Merge again.")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether two tensors of one dtype hold the same bits: -0.0 is not 0.0, NaN is itself."""
    # flat, since one of no dimension has no view in bytes
    return torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


def _check_layer(plan: MergePlan, result: QuantizedCheckpoint, name: str) -> None:
    """Compare the stored tensors of one quantized layer, bit for bit."""
    for tensor, wanted in plan.stored_layer(name).items():
        found = result.reader.get(tensor)
        if _equal(wanted, found):
            continue
        if tensor in plan.kept(name) and _equal(plan.base.reader.get(tensor), found):
            continue
        if not wanted.is_floating_point():
            how = (
                "it must stay as it is. Merge again, into the base that the adapter was trained on."
            )
            raise _wrong(result, tensor, f" differs from the base's: {how}")
        off = float((wanted.double() - found.double()).abs().max())
        how = (
            f" is not what base and adapter give with the convention {plan.convention!r}: "
            f"{int((wanted != found).sum())} of {found.numel()} numbers differ, by up to "
            f"{off:.3g}. It was merged from another adapter or with another factor: merge again."
        )
        raise _wrong(result, tensor, how)


def _check_outputs(plan: MergePlan, result: QuantizedCheckpoint, name: str) -> tuple[float, float]:
    """Return the largest error and change of one adapted layer's outputs, in units of rounding."""
    merge = plan.layers[name]
    base, merged = plan.base.layer(name), result.layer(name)
    matrices = {part: plan.adapter.get_pair(keys) for part, keys in merge.layer.keys.items()}
    convention = None if plan.adapter.is_ours else plan.convention
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, merge.spec.in_features, generator=generator, dtype=torch.float64)
    error = change = 0.0
    for start in range(0, merge.spec.out_features, _COLUMNS):
        part = slice(start, start + _COLUMNS)
        some = {key: (a, b[part]) for key, (a, b) in matrices.items()}
        base_part, merged_part = base.columns(part), merged.columns(part)
        added = added_output(x, merge, some, base_part, convention)
        weight, merged_weight = (ExactWeight(w).values.t() for w in (base_part, merged_part))
        difference = (x @ merged_weight - x @ weight - added).abs()
        # the rounding of what is stored, and what float64 itself loses in sums of K terms
        allowed = _rounding(x.abs(), merge, base_part, merged_part, weight.abs())
        terms = x.abs() @ (weight.abs() + merged_weight.abs())
        allowed += 4 * torch.finfo(x.dtype).eps * merge.spec.in_features * terms
        error = max(error, float((difference / allowed).max()))
        change = max(change, float((added.abs() / allowed).max()))
    if not error <= 1:
        raise VerificationError(
            f"{result.where(name)}: outputs differ from those of base plus adapter (convention "
            f"{plan.convention!r}) by {error:.3g} times what rounding explains. It was merged with "
            "another factor: merge again."
        )
    return error, change


def _rounding(
    x: torch.Tensor,
    merge: LayerMerge,
    base: PackedWeight,
    merged: PackedWeight,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Return how far rounding scales and offsets can move outputs [M, N], from |x| and |W|."""
    spec = merge.merged_spec
    error = _half_ulp(merged.offsets, spec.offsets_dtype)
    if spec.minimum_below is not None:
        minima = merged.offsets.double() - spec.minimum_below * merged.scales.double()
        error += _half_ulp(minima, spec.scales_dtype)
    allowed = formula.pool(x, merged.g_idx, spec.group_size) @ error
    if "scales" in merge.layer.keys:  # a relative error of s' is one of the whole scaled weight
        # (none where a scale is 0: it stays 0, and the offset's own rounding is counted above)
        share = _half_ulp(merged.scales, spec.scales_dtype) / base.scales.double().abs()
        share = share.where(base.scales != 0, 0.0)
        allowed += x @ (weight * expand(share, merged.g_idx, spec.group_size, spec.in_features))
    return allowed


def _half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an upper bound of the error of rounding to `dtype`, float64, shaped as `values`."""
    info = torch.finfo(dtype)
    return (values.double().abs() + info.smallest_normal) * info.eps / 2
