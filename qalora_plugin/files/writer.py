"""Write a sharded safetensors checkpoint tensor by tensor, in the memory of one tensor.

Names, dtypes and shapes are planned first, so headers are written before any data and tensors may
come in any order. A shard gets its real name only when it is complete: after a kill, the shards
that are there can be kept.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .atomic import cannot_write, check_space, replace_file
from .binding import bound_metadata
from .digests import WrittenHash
from .json import write_json
from .names import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from .reader import COPY_BYTES, CheckpointReader
from .safetensors import DTYPES, LENGTH_BYTES, TensorInfo, dtype_code, tensor_nbytes

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""dtype and shape of every tensor of a shard, by name."""

_Made = TypeVar("_Made")
MAX_SHARD_BYTES = 5 << 30
DEFAULT_METADATA = {"format": "pt"}  # what transformers asks of a file
_ALIGNMENT = 8
_HASHING = 2  # threads beside the work: one hashes what is read, one what is written
_MAKERS = 2  # threads that make layers: each may have a layer in memory


def bound_to(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of weights that belong to this config.json (see `binding`)."""
    return DEFAULT_METADATA | bound_metadata(config, CONFIG_FILE)


def split_plan(plan: Plan, max_bytes: int = MAX_SHARD_BYTES) -> list[dict]:
    """Cut a plan into shards of at most `max_bytes` of data (or one larger tensor), in order."""
    shards: list[dict] = [{}]
    size = 0
    for name, entry in plan.items():
        nbytes = tensor_nbytes(*entry)
        if shards[-1] and size + nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += nbytes
    return shards


class ShardWriter:
    """One safetensors file, written to `<path>.part` and renamed when it is closed."""

    def __init__(
        self, path: Path, plan: Plan, metadata: Mapping[str, str] = DEFAULT_METADATA
    ) -> None:
        """Write the header and reserve the space.

        Args:
            path: the file.
            plan: its tensors.
            metadata: the header's `__metadata__`.

        Raises:
            OutputError: the file cannot be written, or the disk is full.
        """
        self.path = path
        self._part = path.with_name(path.name + ".part")
        header, self._infos = _layout(path, plan, metadata)
        self._missing = set(plan)
        end = max((info.start + info.nbytes for info in self._infos.values()), default=len(header))
        try:
            self._file = open(self._part, "w+b", buffering=0)  # noqa: SIM115, closed by close()
            self._hash = WrittenHash(self._file)
            self._write_at(0, memoryview(header))
            self._file.truncate(end)
        except OSError as error:
            raise cannot_write(self._part, error) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor.

        Args:
            name: its name in the plan.
            tensor: dtype and shape as planned; any device.

        Raises:
            ValueError: not planned, written before, or another dtype or shape than planned.
            OutputError: the disk is full.
        """
        info = self._take(name)
        found = (tensor.dtype, tuple(tensor.shape))
        if found != (info.dtype, info.shape):
            raise ValueError(f"{name}: planned {(info.dtype, info.shape)}, found {found}")
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        self._write_at(info.start, memoryview(data.numpy()))  # type: ignore[arg-type]

    def write_raw(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Write one planned tensor from pieces of its bytes (`CheckpointReader.chunks`).

        Raises:
            ValueError: not planned, written before, or of another size than planned.
            OutputError: the disk is full.
        """
        info = self._take(name)
        done = 0
        for chunk in chunks:
            if done + len(chunk) > info.nbytes:
                break
            self._write_at(info.start + done, chunk)
            done += len(chunk)
        else:
            if done == info.nbytes:
                return
        raise ValueError(f"{name}: planned {info.nbytes} bytes, found another number")

    def copy(self, name: str, reader: CheckpointReader, original: str) -> None:
        """Write one planned tensor as `reader` has it under the name `original`.

        It is converted where it is planned in another dtype.
        """
        if reader.info(original).dtype == self._infos[name].dtype:
            self.write_raw(name, reader.finite_chunks(original))
        else:
            reader.check_finite(original)
            self.write(name, reader.get(original).to(self._infos[name].dtype))

    def _take(self, name: str) -> TensorInfo:
        if name not in self._missing:
            raise ValueError(f"{name}: not in the plan of {self.path.name}, or written before")
        self._missing.remove(name)
        return self._infos[name]

    def _write_at(self, start: int, view: memoryview) -> None:
        try:
            _write_all(self._file.fileno(), view, start)
        except OSError as error:
            raise cannot_write(self._part, error) from error
        self._hash.wrote(start, start + view.nbytes)

    def close(self) -> None:
        """Sync the file, hashed while it was written, and give it its name.

        Raises:
            ValueError: a planned tensor was not written.
            OutputError: the file cannot be synced or renamed.
        """
        if self._missing:
            raise ValueError(f"{self.path.name}: not written: {sorted(self._missing)[:5]}")
        try:
            os.fsync(self._file.fileno())
            self._hash.finish(self._part)
            self._file.close()
            replace_file(self._part, self.path)
        except OSError as error:
            raise cannot_write(self._part, error) from error

    def abort(self) -> None:
        """Drop what was written."""
        self._hash.drop()
        self._file.close()
        self._part.unlink(missing_ok=True)


class CheckpointWriter:
    """All weight files of one directory; `write_weights` shows how it is used."""

    def __init__(
        self, directory: Path, plans: Sequence[Plan], metadata: Mapping[str, str] = DEFAULT_METADATA
    ) -> None:
        """Plan the files; nothing is written yet.

        Args:
            directory: where the files go, usually a partial directory.
            plans: tensors of each shard. One shard becomes model.safetensors, more get an index.
            metadata: `__metadata__` of every shard's header.

        Raises:
            ValueError: a tensor is planned in two shards.
            OutputError: they are larger than what is free.
        """
        names = [name for plan in plans for name in plan]
        if len(set(names)) != len(names):
            raise ValueError("a tensor is planned in two shards")
        self.directory = directory
        self.plans = list(plans)
        self.metadata = metadata
        written = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        total = sum(tensor_nbytes(*entry) for plan in self.plans for entry in plan.values())
        check_space(directory, max(total - written, 0))

    def file_name(self, index: int) -> str:
        """Return the name of the shard with this number (from 0)."""
        if len(self.plans) == 1:
            return SINGLE_FILE
        return f"model-{index + 1:05d}-of-{len(self.plans):05d}.safetensors"

    def is_done(self, index: int) -> bool:
        """Say whether an earlier run wrote this shard, with the tensors that are planned now.

        Raises:
            CheckpointError: the file is there, but damaged.
        """
        path = self.directory / self.file_name(index)
        if not path.exists():
            return False
        found = CheckpointReader(self.directory, only=path.name)
        return found.plan(found.tensors) == self.plans[index]

    @contextmanager
    def shard(self, index: int) -> Iterator[ShardWriter]:
        """Open a shard for writing; it is closed at the end, or dropped on an exception."""
        path = self.directory / self.file_name(index)
        shard = ShardWriter(path, self.plans[index], self.metadata)
        try:
            yield shard
        except BaseException:
            shard.abort()
            raise
        shard.close()

    def finish(self) -> None:
        """Write the index, of more than one shard.

        Raises:
            ValueError: a shard was not written.
        """
        for index in range(len(self.plans)):
            name = self.file_name(index)
            if not (self.directory / name).exists():
                raise ValueError(f"{name} was not written")
        if len(self.plans) > 1:
            size = sum(tensor_nbytes(*entry) for plan in self.plans for entry in plan.values())
            names = {n: self.file_name(i) for i, plan in enumerate(self.plans) for n in plan}
            content = {"metadata": {"total_size": size}, "weight_map": names}
            write_json(self.directory / INDEX_FILE, content)


def write_weights(
    directory: Path,
    plan: Plan,
    copies: Mapping[str, tuple[CheckpointReader, str]],
    layer_tensors: Callable[[str], Mapping[str, torch.Tensor]],
    *,
    metadata: Mapping[str, str] = DEFAULT_METADATA,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write all weight files of a directory; while a layer is written, threads make the next ones.

    Args:
        directory: where the files go, usually a partial directory.
        plan: every tensor, in the order of the files; those of a layer follow each other.
        copies: of the tensors that are copied, where from: a checkpoint, and the name there.
        layer_tensors: returns the tensors <layer>.<part> by name, given the name of the layer;
            called in threads, for two layers at once.
        metadata: `__metadata__` of every shard's header.
        progress: called with (tensors written, tensors in all).
    """
    writer = CheckpointWriter(directory, split_plan(plan), metadata)
    names = (name.rpartition(".")[0] for name in plan if name not in copies)
    layers = made_ahead(layer_tensors, list(dict.fromkeys(names)))
    layer: Mapping[str, torch.Tensor] = {}
    done = 0
    with closing(layers), cores_left():
        for index, shard_plan in enumerate(writer.plans):
            with writer.shard(index) as shard:
                for name in shard_plan:
                    if name in copies:
                        shard.copy(name, *copies[name])
                    else:
                        if name not in layer:
                            layer = next(layers)
                        shard.write(name, layer[name])
                    done += 1
                    if progress is not None:
                        progress(done, len(plan))
    writer.finish()


@contextmanager
def cores_left() -> Iterator[None]:
    """Leave cores to the threads that hash: torch's own all wait for one whose core is taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - _HASHING))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def made_ahead(make: Callable[[str], _Made], names: Sequence[str]) -> Generator[_Made]:
    """Yield what is made of each name, in order; threads make the next ones meanwhile."""
    with ThreadPoolExecutor(_MAKERS) as pool:
        coming: deque[Future[_Made]] = deque()
        for name in names:
            coming.append(pool.submit(make, name))
            if len(coming) > _MAKERS:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _layout(
    path: Path, plan: Plan, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header's bytes and the place of every tensor."""
    # wide dtypes first: every tensor is then aligned, which readers that map the file rely on
    order = sorted(plan, key=lambda name: -plan[name][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    infos, end = [], 0
    for name in order:
        dtype, shape = plan[name]
        nbytes = tensor_nbytes(dtype, shape)
        place = {"shape": list(shape), "data_offsets": [end, end + nbytes]}
        code = dtype_code(dtype)
        entries[name] = {"dtype": code} | place
        infos.append(TensorInfo(name, DTYPES[code][0], shape, path, end, nbytes))
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data_start = LENGTH_BYTES + len(text)
    placed = {info.name: replace(info, start=data_start + info.start) for info in infos}
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, placed


def _write_all(descriptor: int, view: memoryview, start: int) -> None:
    view = view.cast("B")
    while view:
        count = os.pwrite(descriptor, view[:COPY_BYTES], start)
        view, start = view[count:], start + count
