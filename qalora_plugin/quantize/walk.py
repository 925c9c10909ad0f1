"""Calibration activations on their way through the blocks, and GPTQ on what each layer sees."""

from collections.abc import Iterator

import torch
from torch import nn

from qalora_kernels import PackedWeight

from ..architecture.blocks import find_blocks
from ..checkpoint.config import QALoRAQuantConfig
from .blocks import Stage, call_block, find_stages, record, watch_inputs
from .gptq import GPTQSettings, Hessian, calibrated_error, gptq
from .source import ModelSource

_BATCH_TOKENS = 1024  # tokens in one forward pass: bounds the memory of a block's activations


class Walk:
    """Goes through a model's blocks in order with one of them in memory.

    For every block: `enter`, then `solve` (or `replace` for each layer that is quantized
    already), then `leave`. Layers are solved in the order of execution, each on the outputs of
    what was quantized before it.

    Args:
        source: the model.
        config: the grid of each layer.
        settings: of GPTQ.
        integer_zeros: restrict zero-points to integers.
        windows: token ids [samples, seq_len].
        dtype: of weights and activations.
        device: where they are.
    """

    def __init__(
        self,
        source: ModelSource,
        config: QALoRAQuantConfig,
        settings: GPTQSettings,
        integer_zeros: bool,
        windows: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Run everything before the blocks."""
        self._source, self._config = source, config
        self._settings, self._integer_zeros = settings, integer_zeros
        self._dtype, self._device = dtype, device
        model = source.model
        self._prefix, self._blocks = find_blocks(model)
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(device)
        needed = self._before_the_blocks()
        first = source.names_in(f"{self._prefix}.0")
        source.fill([*needed, *first], dtype, device)
        batch = max(1, _BATCH_TOKENS // windows.shape[1])
        recording = record(model, self._blocks, list(windows.split(batch)), device)
        self._calls, self._hidden = recording.calls, recording.hidden
        source.empty([*needed, *first])

    def _before_the_blocks(self) -> list[str]:
        """Weights outside the blocks, less those of the output embeddings."""
        model = self._source.model
        head = model.get_output_embeddings()
        return [
            name
            for name in self._source.stored
            if not name.startswith(self._prefix + ".")
            and (head is None or model.get_submodule(name.rpartition(".")[0]) is not head)
        ]

    def enter(self, index: int, finished: frozenset[str] = frozenset()) -> None:
        """Read block `index`, but for the weights of the layers that will be replaced anyway."""
        left_out = {f"{layer}.weight" for layer in finished}
        names = self._source.names_in(f"{self._prefix}.{index}")
        self._source.fill([n for n in names if n not in left_out], self._dtype, self._device)

    def replace(self, layer: str, weight: PackedWeight) -> None:
        """Compute with the quantized weight from now on."""
        linear = self._source.model.get_submodule(layer)
        dense = weight.dequantize(self._dtype).t().contiguous().to(self._device)
        linear.weight = nn.Parameter(dense, requires_grad=False)

    def solve(
        self, index: int, layers: list[str]
    ) -> Iterator[tuple[str, PackedWeight, float | None]]:
        """Quantize layers of block `index`: (layer, weight, relative error on its inputs)."""
        block, calls = self._blocks[index], self._calls[index]
        prefix = f"{self._prefix}.{index}."
        linears = {layer.removeprefix(prefix): self._linear(layer) for layer in layers}
        for stage in find_stages(block, linears, calls[0], self._hidden[0]):
            hessian = self._hessian(index, stage, linears[stage.names[0]])
            for name in stage.names:
                layer = prefix + name
                # as stored, not as rounded to the dtype of the activations
                weight = self._source.tensor(f"{layer}.weight").to(self._device)
                stored = self._source.layer_name(layer)
                spec = self._config.spec_for(stored, weight.shape[1], weight.shape[0])
                quantized = gptq(
                    weight,
                    hessian,
                    bits=spec.bits,
                    group_size=spec.group_size,
                    integer_zeros=self._integer_zeros,
                    offsets_at=spec.offsets_at,
                    settings=self._settings,
                    name=stored,
                )
                self.replace(layer, quantized)
                yield layer, quantized, calibrated_error(weight, quantized, hessian)

    def _linear(self, layer: str) -> nn.Linear:
        linear = self._source.model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        return linear

    def _hessian(self, index: int, stage: Stage, linear: nn.Linear) -> torch.Tensor:
        hessian = Hessian(linear.in_features, self._device)
        watch_inputs(
            self._blocks[index], linear, stage, self._calls[index], self._hidden, hessian.add
        )
        return hessian.mean(f"{self._prefix}.{index}.{stage.names[0]}")

    def leave(self, index: int) -> None:
        """Carry the activations through block `index` and drop its weights."""
        if index + 1 < len(self._blocks):
            for number, call in enumerate(self._calls[index]):
                self._hidden[number] = call_block(self._blocks[index], call, self._hidden[number])
        self._calls[index] = []
        self._source.empty(self._source.names_in(f"{self._prefix}.{index}"))
