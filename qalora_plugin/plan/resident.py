"""Resident memory of training steps on the CPU: what they allocate and free, replayed in `heap`.

The blocks are those of torch's tensors, and the small ones that autograd makes beside them: these
live until the loss is freed, and keep the holes between them from merging.
"""

import contextlib
import statistics
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .heap import Heap

STEPS = 3
STARTS = 6
"""Replays, the heap's addresses shifted by 16 bytes each: fragmentation depends on them by chance,
by a few per cent; the plan is the mean."""

TCACHE = 640
"""Bytes of the first block of a thread's heap, tcache_perthread_struct."""

# bytes of torch 2.13's objects on x86-64, seen by logging malloc during training steps
STORAGE = 96  # c10::StorageImpl
TENSOR = 176  # c10::TensorImpl
VERSION = 24  # c10::VersionCounter, of every tensor that is not a view
AUTOGRAD = 184  # torch::autograd::AutogradMeta, of every result of a node
VIEW = 312  # DifferentiableViewMeta, the same for a view
NODE = 480  # torch::autograd::Node: from 464 to 736 in different operators
LEAF = 472  # torch::autograd::AccumulateGrad, once for every parameter that is used
EDGE = 16  # of a node, for every tensor among its operator's arguments
DIMENSION = 8  # of the shape of its argument, that the node of a view keeps


class AllocationLog(TorchDispatchMode):
    """Allocations and frees, in order, of the operators that run in it.

    Args:
        held: tensors that exist already; their storages are not logged.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()
        self.events: list[tuple[int, int, tuple[int, ...]]] = []
        """(block, bytes of an aligned allocation, bytes of small ones before it); bytes of -1 for
        the free of all of it."""
        self._blocks = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in held}
        self._graph: list[int] = []
        self._leaves: set[int] = set()
        self._recomputed: list[int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        node = _makes_node(func, given)
        if node:
            shape = (DIMENSION * given[0].dim(),) if func.is_view and given[0].dim() else ()
            for leaf in given:
                if leaf.requires_grad and leaf.is_leaf and id(leaf) not in self._leaves:
                    self._leaves.add(id(leaf))
                    self._graph.append(self._allocate(0, (LEAF,)))
            graph = self._graph if self._recomputed is None else self._recomputed
            graph.append(self._allocate(0, (NODE, EDGE * len(given), *shape)))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf, node, func.is_view)
        return out

    def _allocate(self, aligned: int, small: tuple[int, ...]) -> int:
        self._blocks += 1
        self.events.append((self._blocks, aligned, small))
        return self._blocks

    def _free(self, block: int) -> None:
        self.events.append((block, -1, ()))

    def _add(self, tensor: torch.Tensor, node: bool, view: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages.add(key)
            block = self._allocate(storage.nbytes(), (STORAGE,))
            weakref.finalize(storage, self._drop, key, block)
        meta = ((VIEW,) if view else (AUTOGRAD,)) if node else ()
        block = self._allocate(0, (TENSOR, *meta) if view else (TENSOR, VERSION, *meta))
        weakref.finalize(tensor, self._free, block)

    def _drop(self, key: int, block: int) -> None:
        self._storages.discard(key)
        self._free(block)

    def free_graph(self) -> None:
        """Free the nodes made since the last time, as freeing the loss does."""
        for block in reversed(self._graph):
            self._free(block)
        self._graph.clear()
        self._leaves.clear()

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Gradient checkpointing computes a block again: its nodes are freed when it is done."""
        self._recomputed = []
        try:
            yield
        finally:
            for block in reversed(self._recomputed):
                self._free(block)
            self._recomputed = None


def _makes_node(func: Any, given: list[torch.Tensor]) -> bool:
    """Whether autograd records a call of an operator with these tensors."""
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in given)
        and any(isinstance(result.type, torch.TensorType) for result in func._schema.returns)
        and func is not torch.ops.aten.detach.default
    )


def log_steps(
    log: AllocationLog,
    loss: Callable[[], torch.Tensor],
    trained: list[torch.Tensor],
    workspace: int,
    states: int,
) -> None:
    """Run some training steps under `log`, on fake tensors.

    Args:
        log: not entered yet.
        loss: one forward.
        trained: parameters; their gradients are made by the backward and freed after the step.
        workspace: bytes of a buffer that is made once.
        states: fp32 tensors of the optimizer for each parameter, made in the first step.
    """
    with log:
        kept = [torch.empty(workspace, dtype=torch.uint8)] if workspace else []
        for step in range(STEPS):
            value = loss()
            value.backward()
            del value
            log.free_graph()
            if step == 0:
                kept += [torch.empty_like(p, dtype=torch.float32) for p in trained * states]
            for parameter in trained:
                parameter.grad = None


def resident_peak(log: AllocationLog) -> int:
    """Peak of the resident bytes that the logged allocations make, beside what was held before."""
    return round(statistics.mean(_replay(log.events, TCACHE + 16 * i) for i in range(STARTS)))


def _replay(events: list[tuple[int, int, tuple[int, ...]]], start: int) -> int:
    heap = Heap(start)
    blocks: dict[int, list[tuple[int, int]]] = {}
    for block, aligned, small in events:
        if aligned < 0:
            for part in blocks.pop(block):
                heap.free(part)
            continue
        blocks[block] = [heap.malloc(size) for size in small]
        if aligned:
            blocks[block].append(heap.aligned(aligned))
    return heap.peak
