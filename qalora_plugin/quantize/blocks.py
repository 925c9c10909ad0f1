"""Run a transformer block by block: record what each block is called with, and drive them.

No architecture is known here. The model's own forward runs once per batch of token ids with every
block's forward replaced by a recorder that hands the hidden states through; masks, position
embeddings and whatever else a block gets are recorded with it. The real blocks are then called with
these arguments, one after the other.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..architecture.experts import Experts
from ..errors import ConfigError


class _StopForwardError(Exception):
    """All that is wanted of this forward pass has been seen."""


@dataclass
class Call:
    """One call of a block: its arguments, in which the hidden states can be exchanged."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_hidden(self, hidden: torch.Tensor | None) -> "Call":
        """Return the call on other hidden states, or on None, to keep none alive."""
        if "hidden_states" in self.kwargs:
            return Call(self.args, {**self.kwargs, "hidden_states": hidden})
        return Call((hidden, *self.args[1:]), self.kwargs)


class Recording(NamedTuple):
    """One call a block and batch, and for every batch the first block's input [B, T, H]."""

    calls: list[list[Call]]
    hidden: list[torch.Tensor]


@torch.no_grad()
def record(
    model: nn.Module, blocks: nn.ModuleList, batches: list[torch.Tensor], device: torch.device
) -> Recording:
    """Run everything before and between the blocks, and record the blocks' arguments.

    Args:
        model: on `device`, with weights wherever its forward needs them before the last block; the
            first block's too, which is run once to see what a block returns.
        blocks: in the order of their calls.
        batches: token ids [B, T].
        device: where the model is.

    Raises:
        ConfigError: the model does not call its blocks one after the other, each once, on the
            hidden states that the one before returned, or hands one more that depends on these.
    """
    recording = Recording([[] for _ in blocks], [])
    advice = "GPTQ cannot go through this architecture block by block: use method rtn"
    output: Any = None  # of the first block
    elsewhere: Any = None  # the same on other hidden states
    shared: list[torch.Tensor] = []
    expected: torch.Tensor | None = None
    called = 0

    def run(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal output, elsewhere, expected, called
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        in_order = called == index and (index == 0 or hidden is expected)
        if not in_order or not isinstance(hidden, torch.Tensor):
            raise ConfigError(
                f"{type(model).__name__}: expected its blocks to be called in order, each on "
                f"the hidden states of the one before; block {index} is not. {advice}"
            )
        called += 1
        recording.calls[index].append(_share(Call(args, kwargs).with_hidden(None), shared))
        if index == 0:
            recording.hidden.append(hidden)
            if output is None:
                output = forward(*args, **kwargs)
                if isinstance(output, tuple) and len(output) > 1:
                    other = Call(args, kwargs).with_hidden(hidden.flip(-2))
                    elsewhere = forward(*other.args, **other.kwargs)
        elif _reads_more(output, elsewhere, (*args, *kwargs.values())):
            raise ConfigError(
                f"{type(model).__name__}: expected each of its blocks to read of the one before "
                f"the hidden states alone; block {index} reads more that depends on them. {advice}"
            )
        if index == len(blocks) - 1:
            raise _StopForwardError
        # a new object, so that the next block is seen to get this one
        expected = hidden.view_as(hidden)
        return (expected, *output[1:]) if isinstance(output, tuple) else expected

    for index, block in enumerate(blocks):
        block.forward = partial(run, index, block.forward)  # type: ignore[method-assign]
    try:
        for ids in batches:
            called = 0
            try:
                model(input_ids=ids.to(device))
            except _StopForwardError:
                continue
            raise ConfigError(
                f"{type(model).__name__}: {called} of its {len(blocks)} blocks were called. "
                f"{advice}"
            )
    finally:
        for block in blocks:
            del block.forward  # the class's own again
    return recording


def _reads_more(output: Any, elsewhere: Any, given: tuple[Any, ...]) -> bool:
    """Say whether a block is given part of the first one's output that hidden states change.

    What they do not change, such as T5's position bias, is the same for all that a block is run on.

    Args:
        output: of the first block.
        elsewhere: the same on other hidden states; None where it is the hidden states alone.
        given: arguments of a later block.
    """
    return elsewhere is not None and any(
        isinstance(part, torch.Tensor)
        and any(part is value for value in given)
        and not torch.equal(part, other)
        for part, other in zip(output[1:], elsewhere[1:], strict=True)
    )


def _share(call: Call, seen: list[torch.Tensor]) -> Call:
    """Replace tensors by equal ones seen before: masks and positions are the same everywhere."""

    def share(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(share(item) for item in value)
        if isinstance(value, dict):
            return {key: share(item) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        for other in seen:
            same_kind = other.shape == value.shape and other.dtype == value.dtype
            if other is value or (same_kind and torch.equal(other, value)):
                return other
        seen.append(value)
        return value

    return Call(share(call.args), share(call.kwargs))


@torch.no_grad()
def call_block(block: nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """Run the block on hidden states [B, T, H] and return those that come out."""
    call = call.with_hidden(hidden)
    output = block(*call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Stage:
    """Some linear layers of a block that read the same tensor, which depends on earlier stages.

    Args:
        names: of the layers, in the block.
        calls: times that the first of them is called in one forward pass; 0 for never.
    """

    names: list[str]
    calls: int


@torch.no_grad()
def find_stages(
    block: nn.Module, linears: dict[str, nn.Linear], call: Call, hidden: torch.Tensor
) -> list[Stage]:
    """Run the block once and see which of its layers read what, in the order of execution."""
    readers: dict[int, tuple[torch.Tensor, list[str]]] = {}  # tensors live on: ids stay unique
    counts = dict.fromkeys(linears, 0)

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts[name] += 1
        if counts[name] == 1:
            readers.setdefault(id(args[0]), (args[0], []))[1].append(name)

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(watch, name)))
        call_block(block, call, hidden)
    # layers called more than once may share a tensor in one call only: each for itself
    stages = []
    for _, names in readers.values():
        once = [name for name in names if counts[name] == 1]
        if once:
            stages.append(Stage(once, 1))
        stages += [Stage([name], counts[name]) for name in names if counts[name] > 1]
    return stages + [Stage([name], 0) for name, count in counts.items() if count == 0]


@torch.no_grad()
def watch_inputs(
    block: nn.Module,
    linear: nn.Linear,
    stage: Stage,
    calls: list[Call],
    hidden: list[torch.Tensor],
    see: Callable[[torch.Tensor], None],
) -> None:
    """Give `see` the inputs [..., K] of `linear` over all batches, running no further than that."""
    seen = 0

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen
        see(args[0])
        seen += 1
        if seen == stage.calls:
            raise _StopForwardError

    with linear.register_forward_pre_hook(hook):
        for call, states in zip(calls, hidden, strict=True):
            seen = 0
            with suppress(_StopForwardError):
                call_block(block, call, states)


@torch.no_grad()
def watch_experts(
    block: nn.Module, experts: Experts, calls: list[Call], hidden: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run all batches up to a mixture's experts, and return what the router sends them.

    Returns:
        The tokens' hidden states [T, H], and the experts that each goes to [T, k].
    """
    states, chosen = [], []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = dict(zip(("hidden_states", "top_k_index"), args, strict=False)) | kwargs
        states.append(found["hidden_states"])
        chosen.append(found["top_k_index"])
        raise _StopForwardError

    with experts.register_forward_pre_hook(hook, with_kwargs=True):
        for call, batch in zip(calls, hidden, strict=True):
            with suppress(_StopForwardError):
                call_block(block, call, batch)
    return torch.cat(states), torch.cat(chosen)
