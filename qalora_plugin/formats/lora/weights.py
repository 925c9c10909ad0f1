"""Compare an exported LoRA adapter with the adapter that it was made from."""

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open

from ...errors import VerificationError
from ...files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ...merge.plan import MergePlan, plan_merge
from ...tuner.scaling import SCALING_FIELDS
from ..export import Progress
from .write import groups_of_inputs, layer_keys, saved_keys

_TOLERANCE = 1e-6  # of the largest change of a layer's weights


def compare(
    exported: Path, adapter: str | Path, base: str | Path | None, progress: Progress | None
) -> tuple[int, int, float]:
    """Compare the change of each weight with the change of its group's offset by the adapter.

    Whole tensors (modules_to_save) have to be the adapter's.

    Returns:
        The number of layers, that of whole tensors, and the largest error as a share of a layer's
        largest change.

    Raises:
        VerificationError: a tensor is missing, or the change or a setting is another.
        CheckpointError, AdapterError: one of the three is damaged.
    """
    plan = plan_merge(adapter, base)
    _check_settings(exported, plan)
    worst = 0.0
    with safe_open(exported / ADAPTER_WEIGHTS_FILE, framework="pt") as file:
        stored = set(file.keys())
        for done, name in enumerate(plan.layers, start=1):
            keys = layer_keys(plan, name)
            if not stored.issuperset(keys):
                raise VerificationError(f"{exported}: no {' and '.join(keys)}.")
            error = _error(exported, plan, name, *map(file.get_tensor, keys))
            if not error <= _TOLERANCE:
                raise VerificationError(
                    f"{exported}: {name}: changes weights by something else than the adapter "
                    f"{adapter} (by {error:.3g} of the largest change)."
                )
            worst = max(worst, error)
            if progress is not None:
                progress(done, len(plan.layers))
        whole = saved_keys(plan)
        for key in whole:
            if key not in stored or not torch.equal(file.get_tensor(key), plan.adapter.get(key)):
                raise VerificationError(
                    f"{exported / ADAPTER_WEIGHTS_FILE}: {key} is missing, or differs from the "
                    f"adapter's, {adapter}. Export again."
                )
    return len(plan.layers), len(whole), worst


def _check_settings(exported: Path, plan: MergePlan) -> None:
    """Compare what scales the change: ranks, alphas and use_rslora."""
    config = LoraConfig.from_pretrained(exported)
    for field in SCALING_FIELDS:
        stated, wanted = getattr(config, field), plan.adapter.config.get(field)
        if (stated or None) != (wanted or None):
            raise VerificationError(
                f"{exported / ADAPTER_CONFIG_FILE}: {field}: expected {wanted!r}, that of the "
                f"adapter, found {stated!r}. Export again."
            )


def _error(exported: Path, plan: MergePlan, name: str, a: torch.Tensor, b: torch.Tensor) -> float:
    """Return by how much of its largest number a layer's change [N, K] is wrong."""
    merge = plan.layers[name]
    change = merge.change(plan.adapter, "zeros")
    assert change is not None  # else it would not have been exported
    expected = change.delta().t()[:, groups_of_inputs(plan, name)]
    found = merge.layer.scaling * (b.double() @ a.double())
    if found.shape != expected.shape:
        raise VerificationError(f"{exported}: {name}: of another shape than the base.")
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(error)
