"""Quantize layers on calibration activations, which are carried through the blocks, or without."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from qalora_kernels import PackedWeight, QuantSpec

from ..architecture.experts import Experts, find_experts
from .blocks import Stage, call_block, find_stages, record, watch_experts, watch_inputs
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

    Attributes:
        experts: of the block that is being solved: "calibrated", and among them those that
            "few_tokens" reached.
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
        self.experts: Counter[str] = Counter()
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
        mixtures = {
            name: experts
            for name, experts in find_experts(block).items()
            if any(layer.startswith(f"{name}.") for layer in linears)
        }
        routed = tuple(f"{name}." for name in mixtures)
        alone = {name: m for name, m in linears.items() if not name.startswith(routed)}
        for stage in find_stages(block, alone, calls[0], self._hidden[0]):
            hessian = self._hessian(index, stage, linears[stage.names[0]])
            for name in stage.names:
                yield prefix + name, hessian
        for name, experts in mixtures.items():
            for layer, hessian in self._expert_hessians(index, name, experts):
                if layer in linears:
                    yield prefix + layer, hessian

    def _expert_hessians(
        self, index: int, name: str, experts: Experts
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the layers of a mixture in a block expert by expert, each with its H.

        An expert sees the tokens that the router sends it; if these are fewer than its inputs,
        which leaves H without full rank, all tokens of the layer.
        """
        block, calls = self._source.blocks[index], self._calls[index]
        states, chosen = watch_experts(block, experts, calls, self._hidden)
        for number, expert in enumerate(experts.experts):
            tokens = states[(chosen == number).any(-1)]
            self.experts["calibrated"] += 1
            if len(tokens) < states.shape[-1]:
                self.experts["few_tokens"] += 1
                tokens = states
            within = f"{self._source.block_names[index]}.{name}.{number}"
            outer = self._moments(tokens, lambda x: x, within)
            yield f"{name}.{number}.{expert.names.gate}", outer
            yield f"{name}.{number}.{expert.names.up}", outer
            del outer
            yield (
                f"{name}.{number}.{expert.names.down}",
                self._moments(tokens, expert.inner, within),
            )

    @torch.no_grad()
    def _moments(
        self, tokens: torch.Tensor, read: Callable[[torch.Tensor], torch.Tensor], name: str
    ) -> torch.Tensor:
        """Return H of what an expert's layer reads, given its tokens [M, H]."""
        inputs = Hessian(read(tokens[:1]).shape[-1], self._source.device)
        for part in tokens.split(_BATCH_TOKENS):
            inputs.add(read(part))
        return inputs.mean(name)

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
