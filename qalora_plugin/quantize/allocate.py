"""Choose the bits of every layer by how much its rounding changes the model's distributions.

To second order the KL divergence of next tokens, in nats a token, that rounding one layer's weight
by e = W - Q costs is

    1/2 sum_n E[g_n^2] e_n H e_n^T        H = E[x x^T] over its inputs, g its output's gradient

where g [N] is the gradient of log p(y) of a token y that is drawn from the model itself: its second
moment is Fisher's information, of which the diagonal over outputs is taken. e is GPTQ's own
error, on a sample of the outputs. Layers are taken to be independent. Widths are then chosen
greedily on each layer's convex hull of (size, divergence), the best return for a bit first, as
Shoham and Gersho allocate bits (IEEE Trans. ASSP 36(9), 1988).
"""

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qalora_kernels import SUPPORTED_BITS, QuantSpec

from ..errors import ConfigError
from ..files.progress import progress_meter
from .gptq import gptq
from .options import QuantizeOptions
from .source import ModelSource
from .walk import Walk

_GRADIENT_WINDOWS = 8
_HESSIAN_WINDOWS = 16
_OUTPUTS = 128  # of a layer, whose error is measured


@dataclass(frozen=True)
class Candidate:
    """A grid that a layer may get, its size in bits, and the divergence that it costs in nats."""

    spec: QuantSpec
    divergence: float

    @property
    def size(self) -> int:
        """Bits of the integers, scales and offsets."""
        return stored_bits(self.spec)


def stored_bits(spec: QuantSpec) -> int:
    """Return the bits that a layer takes in a checkpoint: its integers, scales and offsets."""
    numbers = 8 * (spec.scales_dtype.itemsize + spec.stored_dtype.itemsize)
    weights = spec.bits * spec.in_features + numbers * spec.num_groups
    return weights * spec.out_features


def allocate(layers: Mapping[str, Sequence[Candidate]], budget: float) -> dict[str, Candidate]:
    """Choose one candidate a layer, with the least sum of divergences that the greedy way finds.

    Args:
        layers: the candidates of each layer.
        budget: bits of all layers together, see `check_target`.
    """
    hulls = {name: _hull(candidates) for name, candidates in layers.items()}
    place = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].size for hull in hulls.values())

    def offer(name: str) -> tuple[float, str]:
        low, high = hulls[name][place[name] : place[name] + 2]
        return (high.divergence - low.divergence) / (high.size - low.size), name

    offers = [offer(name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(offers)
    while offers:
        _, name = heapq.heappop(offers)
        low, high = hulls[name][place[name] : place[name] + 2]
        if high.size - low.size > left:
            continue  # a smaller layer may still fit
        left -= high.size - low.size
        place[name] += 1
        if place[name] + 1 < len(hulls[name]):
            heapq.heappush(offers, offer(name))
    return {name: hull[place[name]] for name, hull in hulls.items()}


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the lower convex hull over size, smallest first, as far as the divergence falls."""
    hull: list[Candidate] = []
    for new in sorted(candidates, key=lambda c: (c.size, c.divergence)):
        if hull and new.divergence >= hull[-1].divergence:
            continue
        while len(hull) > 1:
            (a, b) = hull[-2:]
            if (b.divergence - a.divergence) * (new.size - a.size) < (
                new.divergence - a.divergence
            ) * (b.size - a.size):
                break
            hull.pop()
        hull.append(new)
    return hull


def grids_by_layer(
    specs: Mapping[str, QuantSpec],
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the most common bits and group size, and `dynamic` for the layers that have others.

    Args:
        specs: the grid of every layer, by its name in the checkpoint.
    """
    grids = {name: (spec.bits, spec.group_size) for name, spec in specs.items()}
    (bits, group_size), _ = Counter(grids.values()).most_common(1)[0]
    dynamic = {
        name: {"bits": grid[0], "group_size": grid[1]}
        for name, grid in grids.items()
        if grid != (bits, group_size)
    }
    return {"bits": bits, "group_size": group_size}, dynamic


def _budget(specs: Mapping[str, QuantSpec], target: float) -> float:
    """Return the bits that layers take with `target` bits a weight everywhere."""
    total = 0.0
    for spec in specs.values():
        weights = spec.in_features * spec.out_features
        total += stored_bits(spec) + (target - spec.bits) * weights
    return total


def check_target(specs: Mapping[str, QuantSpec], fixed: Collection[str], target: float) -> None:
    """Refuse a `target_bits` that the layers whose bits `dynamic` gives leave no room for.

    Raises:
        ConfigError: says how large the model gets with the least bits in all others.
    """
    least = min(SUPPORTED_BITS)
    smallest = {n: s if n in fixed else replace(s, bits=least) for n, s in specs.items()}
    room = _budget(specs, target) - sum(map(stored_bits, smallest.values()))
    if room < 0:
        weights = sum(spec.in_features * spec.out_features for spec in specs.values())
        needed = math.ceil((target - room / weights) * 100) / 100
        raise ConfigError(
            f"target_bits: expected {needed:.2f} or more, found {target}: so much "
            f"the {len(fixed)} layers take whose bits dynamic gives, with {least} bits everywhere "
            "else. Raise it, or fix fewer layers"
        )


class BitChooser:
    """Measures every layer of a model and chooses its bits.

    The whole 16-bit model is in memory for one backward pass, then one block at a time.

    Args:
        source: the 16-bit model.
        specs: a grid of every layer to quantize, whose bits are replaced.
        options: of quantizing; layers that `dynamic` names keep their grid.
        windows: token ids [samples, seq_len]; the first ones are used.
    """

    def __init__(
        self,
        source: ModelSource,
        specs: dict[str, QuantSpec],
        options: QuantizeOptions,
        windows: torch.Tensor,
    ) -> None:
        self._source, self._specs, self._options = source, specs, options
        self._windows = windows
        # for llama.cpp, which has no type of 8 bits with a minimum
        top = 4 if options.offsets_at == "minimum" else 8
        self._widths = [bits for bits in SUPPORTED_BITS if bits <= top]

    def choose(self, fixed: set[str]) -> tuple[dict[str, QuantSpec], dict[str, Any]]:
        """Return the grid of every layer, and the record of what was measured.

        Args:
            fixed: layers that keep their grid.

        The budget is the size that all layers would have with `target_bits` everywhere.
        """
        target = self._options.target_bits
        assert target is not None
        layers: dict[str, list[Candidate]] = {}
        hidden = not self._options.progress
        total = len(self._specs)
        with progress_meter("measuring layers", "layer", total=total, disable=hidden) as bar:
            for name, candidates in self._measure(fixed):
                layers[name] = candidates
                bar.update()
        chosen = allocate(layers, _budget(self._specs, target))
        weights = sum(s.in_features * s.out_features for s in self._specs.values())
        specs = {name: chosen[name].spec for name in self._specs}
        record = {
            "target_bits": target,
            "stored_bits_a_weight": round(sum(map(stored_bits, specs.values())) / weights, 4),
            "predicted_kl": round(sum(c.divergence for c in chosen.values()), 6),
            "layers_by_bits": dict(sorted(Counter(s.bits for s in specs.values()).items())),
        }
        return specs, record

    def _measure(self, fixed: set[str]) -> Iterator[tuple[str, list[Candidate]]]:
        information = self._information()
        walk = Walk(self._source, self._specs, self._options, self._windows[:_HESSIAN_WINDOWS])
        for index, block in enumerate(self._source.block_names):
            walk.enter(index)
            layers = [name for name in self._specs if name.startswith(f"{block}.")]
            for name, hessian in walk.hessians(index, layers):
                spec = self._specs[name]
                if name in fixed:
                    yield name, [Candidate(spec, 0.0)]
                    continue
                specs = [replace(spec, bits=bits) for bits in self._widths]
                costs = (self._cost(name, s, hessian, information[name]) for s in specs)
                yield name, [Candidate(s, cost) for s, cost in zip(specs, costs, strict=True)]
            walk.leave(index)

    def _cost(
        self, name: str, spec: QuantSpec, hessian: torch.Tensor, information: torch.Tensor
    ) -> float:
        """Return the divergence that GPTQ's error with this grid costs."""
        step = max(1, spec.out_features // _OUTPUTS)
        weight = self._source.tensor(f"{name}.weight")[::step].float()
        quantized = gptq(
            weight,
            hessian,
            replace(spec, out_features=len(weight)),
            zero_points=self._options.zeros,
            settings=replace(self._options.solver, sweeps=0),
            name=self._source.layer_name(name),
        )
        e = weight - quantized.dequantize(torch.float32).t()
        errors = ((e @ hessian) * e).sum(1)
        return 0.5 * len(information) * (information[::step] * errors).mean().item()

    def _information(self) -> dict[str, torch.Tensor]:
        """Return the mean square of each layer's output gradient over tokens, fp32 [N]."""
        source = self._source
        model = source.model
        source.fill(source.stored)
        source.move_buffers()
        found = {
            name: torch.zeros(s.out_features, device=source.device)
            for name, s in self._specs.items()
        }
        handles = [model.get_input_embeddings().register_forward_hook(_require_gradient)]
        for name in found:
            watch = partial(_watch_gradient, found, name)
            handles.append(model.get_submodule(name).register_forward_hook(watch))
        windows = self._windows[:_GRADIENT_WINDOWS]
        generator = torch.Generator(source.device).manual_seed(self._options.seed)
        for ids in windows.split(1):
            logits = model(input_ids=ids.to(source.device)).logits.flatten(0, -2).float()
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        source.empty(source.stored)
        return {name: total / windows.numel() for name, total in found.items()}


def _require_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_()


def _watch_gradient(
    found: dict[str, torch.Tensor], name: str, module: nn.Module, args: Any, output: torch.Tensor
) -> None:
    def add(gradient: torch.Tensor) -> None:
        found[name] += gradient.detach().float().flatten(0, -2).square().sum(0)

    output.register_hook(add)
