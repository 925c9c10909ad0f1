"""Write a model's shards one block after another, leaving out those that are finished already."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qalora_kernels import PackedWeight, QuantSpec
from qalora_kernels.stored import TensorPlan, layer_plan

from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.fingerprint import combine, mark
from ..checkpoint.layout import pack_layer, read_layer
from ..files.atomic import replace_text
from ..files.json import json_text, read_json
from ..files.names import REPORT_FILE
from ..files.reader import CheckpointReader
from ..files.writer import CheckpointWriter, ShardWriter, bound_to, split_plan
from .source import ModelSource

EXPERT_COUNTS = ("calibrated", "few_tokens")
"""A mixture's experts, and those among them that fewer tokens than inputs reached."""

Tensors = Mapping[str, torch.Tensor]
Solved = Iterator[tuple[str, PackedWeight, float | None]]
"""(layer, weight, relative error of its output or None), one after the other."""


class BlockShards:
    """The shards of a quantized model: what is outside the blocks, then one per block.

    Args:
        directory: where they go; finished ones that are there are kept.
        source: the 16-bit model.
        specs: the grid of every layer to quantize, by its name in the model.
        config: of the result.

    Attributes:
        writer: of the shards; its `finish` writes the index.
        finished: whether each block was written by an earlier run.
        report: quantization_report.json: {"layers": ...} as in `pipeline.QuantizeResult`, of the
            blocks that are written, and {"experts": ...} and {"refined": ...} likewise.
    """

    def __init__(
        self,
        directory: Path,
        source: ModelSource,
        specs: dict[str, QuantSpec],
        config: QALoRAQuantConfig,
    ) -> None:
        """Plan them, and see which are finished."""
        report = directory / REPORT_FILE
        self.report = read_json(report) if report.exists() else {"layers": {}}
        self._source, self._specs, self._desc_act = source, specs, config.desc_act
        blocks = [self._block_plan(index) for index in range(len(source.blocks))]
        inside = {name for block in source.block_names for name in source.names_in(block)}
        copied = {source.stored[name] for name in inside}
        outside = [name for name in source.reader.tensors if name not in copied]
        plans = split_plan(source.reader.plan(outside)) if outside else []
        self._first = len(plans)
        final = {**source.reader.config, "quantization_config": config.to_dict()}
        self.writer = CheckpointWriter(directory, plans + blocks, bound_to(final))
        self.finished = [self.writer.is_done(self._first + index) for index in range(len(blocks))]

    def layers(self, index: int) -> list[str]:
        """Return the quantized layers of block `index`, by their names in the model."""
        block = self._source.block_names[index] + "."
        return [name for name in self._specs if name.startswith(block)]

    def _dense_names(self, index: int) -> list[str]:
        """Return the stored tensors of a block that are copied: norms, biases, kept layers."""
        replaced = {f"{layer}.weight" for layer in self._specs}
        names = self._source.names_in(self._source.block_names[index])
        return [self._source.stored[name] for name in names if name not in replaced]

    def _block_plan(self, index: int) -> TensorPlan:
        plan: TensorPlan = self._source.reader.plan(self._dense_names(index))
        for layer in self.layers(index):
            name = self._source.layer_name(layer)
            plan |= layer_plan(name, self._specs[layer], self._desc_act)
        return plan

    def _copy(self, shard: ShardWriter, names: Iterable[str]) -> None:
        for name in names:
            shard.copy(name, self._source.reader, name)

    def write_outside(self) -> None:
        """Copy the tensors outside the blocks."""
        for index in range(self._first):
            if not self.writer.is_done(index):
                with self.writer.shard(index) as shard:
                    self._copy(shard, self.writer.plans[index])

    def write_block(
        self, index: int, solved: Solved, experts: Mapping[str, int] | None = None
    ) -> Iterator[str]:
        """Write block `index` layer by layer as `solved` gives them; yield their names.

        `experts` are counts for the report, complete once `solved` is at its end.
        """
        names = map(self._source.layer_name, self.layers(index))
        # a run that was killed before the shard got its name has reported, and counted, the block
        counted_before = not self.report["layers"].keys().isdisjoint(names)
        with self.writer.shard(self._first + index) as shard:
            for layer, weight, error in solved:
                name, spec = self._source.layer_name(layer), weight.spec
                for tensor, value in pack_layer(name, weight).items():
                    shard.write(tensor, value)
                entry = {"bits": spec.bits, "group_size": spec.group_size, "error": error}
                self.report["layers"][name] = entry
                yield name
            self._copy(shard, self._dense_names(index))
            if experts and not counted_before:
                counted = Counter(self.report.get("experts", {})) + Counter(experts)
                self.report["experts"] = {name: counted[name] for name in EXPERT_COUNTS}
            self.add_to_report()

    def add_to_report(self, **facts: Any) -> None:
        """Write the report, with these facts in it."""
        self.report |= facts
        replace_text(self.writer.directory / REPORT_FILE, json_text(self.report))

    def read_block(self, index: int) -> Iterator[tuple[str, PackedWeight]]:
        """Yield the layers of a finished block."""
        reader = self._reader(index)
        for layer in self.layers(index):
            yield layer, read_layer(reader, self._source.layer_name(layer), self._specs[layer])

    def rewrite(self, layers: Iterable[tuple[str, PackedWeight]], dense: Tensors) -> None:
        """Replace numbers in finished shards; every shard is the old one or the new one, whole.

        Args:
            layers: quantized layers, by their names in the model.
            dense: parameters, by their names in the model, in any float dtype.
        """
        new = {self._source.stored[name]: tensor for name, tensor in dense.items()}
        for layer, weight in layers:
            new |= pack_layer(self._source.layer_name(layer), weight)
        for index, plan in enumerate(self.writer.plans):
            if new.keys().isdisjoint(plan):
                continue
            old = CheckpointReader(self.writer.directory, only=self.writer.file_name(index))
            with self.writer.shard(index) as shard:
                for name, (dtype, _) in plan.items():
                    if name in new:
                        shard.write(name, new[name].to(dtype))
                    else:
                        shard.copy(name, old, name)

    def _reader(self, index: int) -> CheckpointReader:
        name = self.writer.file_name(self._first + index)
        return CheckpointReader(self.writer.directory, only=name)

    def fingerprint(self) -> str:
        """Return the fingerprint of all layers' integers, read from the finished shards."""
        marks = []
        for index in range(len(self.finished)):
            reader = self._reader(index)
            for layer in self.layers(index):
                qweight = reader.get(f"{self._source.layer_name(layer)}.qweight")
                marks.append(mark(layer, qweight))
        return combine(marks)
