"""Quantize layers on calibration activations, which are carried through the blocks, or without."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from qalora_kernels import PackedWeight, QuantSpec

from .blocks import Stage, call_block, find_stages, record, watch_inputs
from .gptq import Hessian, calibrated_error, gptq
from .options import QuantizeOptions
from .rtn import rtn
from .shards import Solved
from .source import ModelSource

_BATCH_TOKENS = 1024  # tokens in one forward pass: bounds the memory of a block's activations


def round_layers(
    source: ModelSource, specs: dict[str, QuantSpec], options: QuantizeOptions, layers: list[str]
) -> Solved:
    """Quantize layers without data: (layer, weight, None)."""
    for layer in layers:
        weight = rtn(
            source.tensor(f"{layer}.weight"),
            specs[layer],
            name=source.layer_name(layer),
            zero_points=options.zeros,
            search=options.mse,
        )
        yield layer, weight, None


class Walk:
    """Goes through a model's blocks in order with one of them in memory.

    For every block: `enter`, then `solve` unless all its layers are quantized already, then
    `leave`. Layers are solved in the order of execution, each on the outputs of what was quantized
    before it.

    Args:
        source: the model.
        specs: the grid of every layer to quantize, by its name in the model.
        options: the solver's.
        windows: token ids [samples, seq_len].
    """

    def __init__(
        self,
        source: ModelSource,
        specs: dict[str, QuantSpec],
        options: QuantizeOptions,
        windows: torch.Tensor,
    ) -> None:
        """Run everything before the blocks."""
        self._source, self._specs, self._options = source, specs, options
        source.move_buffers()
        needed = [*self._before_the_blocks(), *source.names_in(source.block_names[0])]
        source.fill(needed)
        batch = max(1, _BATCH_TOKENS // windows.shape[1])
        recording = record(source.model, source.blocks, list(windows.split(batch)), source.device)
        self._calls, self._hidden = recording.calls, recording.hidden
        source.empty(needed)

    def _before_the_blocks(self) -> list[str]:
        """Return the weights outside the blocks, less those of the output embeddings."""
        source, head = self._source, self._source.model.get_output_embeddings()
        outside = set(source.stored).difference(*map(source.names_in, source.block_names))
        parents = {name: source.model.get_submodule(name.rpartition(".")[0]) for name in outside}
        return [name for name in source.stored if name in outside and parents[name] is not head]

    def enter(self, index: int, quantized: Iterable[tuple[str, PackedWeight]] = ()) -> None:
        """Read block `index`; layers that are quantized already are given instead."""
        given = set()
        for layer, weight in quantized:
            self._replace(layer, weight)
            given.add(f"{layer}.weight")
        names = self._source.names_in(self._source.block_names[index])
        self._source.fill([name for name in names if name not in given])

    def _replace(self, layer: str, weight: PackedWeight) -> None:
        """Compute with the quantized weight from now on."""
        dense = weight.dequantize(self._source.dtype).t().contiguous().to(self._source.device)
        self._linear(layer).weight = nn.Parameter(dense, requires_grad=False)

    def solve(self, index: int, layers: list[str]) -> Solved:
        """Quantize layers of block `index`: (layer, weight, relative error on its inputs)."""
        for layer, hessian in self.hessians(index, layers):
            # as stored, not as rounded to the dtype of the activations
            weight = self._source.tensor(f"{layer}.weight")
            quantized = gptq(
                weight,
                hessian,
                self._specs[layer],
                zero_points=self._options.zeros,
                settings=self._options.solver,
                name=self._source.layer_name(layer),
            )
            self._replace(layer, quantized)
            yield layer, quantized, calibrated_error(weight, quantized, hessian)

    def hessians(self, index: int, layers: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield layers of block `index` in the order of execution, each with its H, fp32 [K, K].

        H is recorded when it is asked for, on what the layers before it are by then.
        """
        block, calls = self._source.blocks[index], self._calls[index]
        prefix = f"{self._source.block_names[index]}."
        linears = {layer.removeprefix(prefix): self._linear(layer) for layer in layers}
        for stage in find_stages(block, linears, calls[0], self._hidden[0]):
            hessian = self._hessian(index, stage, linears[stage.names[0]])
            for name in stage.names:
                yield prefix + name, hessian

    def _linear(self, layer: str) -> nn.Linear:
        linear = self._source.model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        return linear

    def _hessian(self, index: int, stage: Stage, linear: nn.Linear) -> torch.Tensor:
        inputs = Hessian(linear.in_features, self._source.device)
        block, calls = self._source.blocks[index], self._calls[index]
        watch_inputs(block, linear, stage, calls, self._hidden, inputs.add)
        return inputs.mean(f"{self._source.block_names[index]}.{stage.names[0]}")

    def leave(self, index: int) -> None:
        """Carry the activations through block `index` and drop its weights."""
        blocks = self._source.blocks
        if index + 1 < len(blocks):
            for number, call in enumerate(self._calls[index]):
                self._hidden[number] = call_block(blocks[index], call, self._hidden[number])
        self._calls[index] = []
        self._source.empty(self._source.names_in(self._source.block_names[index]))
