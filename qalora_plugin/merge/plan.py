"""Plan a merge: the whole result, and every reason not to merge, before anything is written.

    read   `open_adapter`, `open_base`   both whole, each checked in itself
    plan   `make_plan`                   names, folds, dense tensors and config.json, as one value
    write  `merge.merge_adapter`

No step changes what an earlier one made. Verifying and exporting start from the same plan.
"""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight
from qalora_kernels.stored import TensorPlan, layer_header, layer_plan

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.fit import check_fit
from ..checkpoint.layout import pack_layer
from ..checkpoint.merged import MergedAdapter, merged_from_files
from ..checkpoint.validate import bad_values
from ..errors import QALoRAError
from ..files.digests import SHA256, file_digest
from ..files.manifest import start_check
from ..files.reader import CheckpointReader
from .adapter import Adapter, open_adapter, open_base
from .inherit import with_special_tokens
from .modules_to_save import DenseTensors, plan_dense
from .names import TrainedModel, find_trained_model
from .pairing import LayerMerge, pair


@dataclass(frozen=True)
class MergePlan:
    """A merge that has passed every check; nothing is written yet. See `plan_merge`.

    Args:
        adapter, base: what is merged; neither is changed.
        convention: "sum", "mean" or "peft".
        trained: the names of the model that was trained and of the base.
        layers: the adapted layers, by name in the base.
        dense: where all tensors outside of quantized layers come from.
        tensors: name, dtype and shape of every tensor of the result.
        config: config.json of the result.
    """

    adapter: Adapter
    base: QuantizedCheckpoint
    convention: str
    trained: TrainedModel
    layers: dict[str, LayerMerge]
    dense: DenseTensors
    tensors: TensorPlan
    config: dict[str, Any]

    def _merge(self, name: str, weight: PackedWeight) -> PackedWeight:
        if name not in self.layers:
            return weight
        merged = self.layers[name].fold(self.adapter, weight)
        bad = bad_values(merged.scales, merged.offsets)
        if bad is not None:
            raise self.adapter.error(
                f"{name}: folded in, {bad}, in their stored dtype. Training diverged: use an "
                "earlier checkpoint."
            )
        return merged

    def stored_layer(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one quantized layer by name, as the result stores them.

        Raises:
            AdapterError: folded in, the change leaves the range of the stored dtype.
        """
        return pack_layer(name, self._merge(name, self.base.layer(name)))

    def written_layer(self, name: str) -> dict[str, torch.Tensor]:
        """Return the same; the integers, where they are `copied`, are on the meta device."""
        weight = self.base.layer(name, integers=self.base.is_foreign)
        return pack_layer(name, self._merge(name, weight))

    @property
    def copied(self) -> dict[str, tuple[CheckpointReader, str]]:
        """Where the tensors that are copied come from: a checkpoint, and the name there."""
        base, adapter = self.base, self.adapter
        found = {name: (base.reader, own) for name, own in self.dense.from_base.items()}
        found |= {name: (adapter.reader, key) for name, key in self.dense.from_adapter.items()}
        for name in base.layers:
            found |= {tensor: (base.reader, tensor) for tensor in self.kept(name)}
        return found

    def kept(self, name: str) -> list[str]:
        """Return the tensors of a layer that stay as the base stores them; none if it is foreign.

        Of an adapted layer these are the integers. Another one, read and packed again as a merge in
        memory does it, could lose the last bits of a minimum (`qalora_kernels.load_offsets`).
        """
        base = self.base
        if base.is_foreign:
            return []
        if name in self.layers:
            return [f"{name}.{base.integers}"]
        return [*layer_header(name, base.layers[name], base.config.desc_act)]


def plan_merge(
    adapter: str | Path, base: str | Path | None = None, convention: str = "auto"
) -> MergePlan:
    """Read and plan a merge; see `merge.merge_adapter` for arguments and errors."""
    plan, hashes = start_plan(adapter, base, convention)
    hashes.result()
    return plan


def start_plan(
    adapter: str | Path, base: str | Path | None = None, convention: str = "auto"
) -> tuple[MergePlan, Future[bool]]:
    """Do the same while the base's files are hashed, for who writes before that is done.

    Returns:
        The plan, and the check of the base's hashes: what was written may be given its name once
        its `result` is there, which raises the error that `plan_merge` does.
    """
    opened = open_adapter(adapter)
    chosen = opened.convention(convention)
    found = open_base(opened, base, check_hashes=False)
    hashes = start_check(found.directory)
    try:
        check_fit(found)
        return make_plan(opened, found, chosen), hashes
    except QALoRAError:
        hashes.result()  # a damaged file explains more than what does not fit
        raise


def make_plan(adapter: Adapter, base: QuantizedCheckpoint, convention: str) -> MergePlan:
    """Fit an adapter, which pools as `convention` says, to its base; neither is changed.

    Raises:
        AdapterError: the two do not belong together, or cannot be merged.
    """
    trained = find_trained_model(adapter, base)
    layers = pair(adapter, base, trained, convention)
    if base.config.desc_act and not base.is_foreign:  # what is copied is looked at here
        for name in base.layers.keys() - layers.keys():
            base.layer(name, integers=False)
    dense = plan_dense(adapter, base, trained)
    tensors = base.plan()
    for name, merge in layers.items():
        tensors |= layer_plan(name, merge.merged_spec, base.config.desc_act)
    for name, original in dense.from_base.items():
        tensors[name] = tensors[original]
    for name, key in dense.from_adapter.items():
        tensors[name] = adapter.reader.plan([key])[key]
    record = MergedAdapter(
        adapter=adapter.directory.resolve().name,
        adapter_sha256=file_digest(adapter.reader.files[0], SHA256),
        peft_type=adapter.peft_type,
        convention=convention,
        adapt=adapter.adapt,
        r=adapter.config["r"],
        lora_alpha=adapter.config["lora_alpha"],
        layers=len(layers),
        modules_to_save=sorted(dense.from_adapter),
    )
    merged = merged_from_files(record, base.config.merged)
    quantization = {**base.config.to_dict(), **_grids(base, layers), "merged": merged}
    checked = QALoRAQuantConfig(**quantization).to_dict()
    config = with_special_tokens(dense.config, adapter.directory)
    config = {**config, "quantization_config": checked}
    return MergePlan(adapter, base, convention, trained, layers, dense, tensors, config)


def _grids(base: QuantizedCheckpoint, layers: dict[str, LayerMerge]) -> dict[str, Any]:
    """Return what changes in the quantization config where groups are split."""
    split = {m.merged_spec.group_size for m in layers.values() if m.merged_spec != m.spec}
    if not split:
        return {}
    usual = (base.config.bits, min(split))
    dynamic = {}
    for name, spec in base.layers.items():
        spec = layers[name].merged_spec if name in layers else spec
        if (spec.bits, spec.group_size) != usual:
            dynamic[name] = {"bits": spec.bits, "group_size": spec.group_size}
    return {"group_size": usual[1], "dynamic": dynamic}
