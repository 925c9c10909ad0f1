"""Read tensors of a checkpoint directory one by one, never holding more than what was asked for.

Files are read by offset into fresh memory, not mapped: resident memory falls again as soon as a
tensor is dropped, so a whole 70B checkpoint can be walked in the memory of its largest tensor.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .binding import check_bound
from .names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from .safetensors import TensorInfo, read_header
from .schemas import ConfigFile, Index, read_as

if TYPE_CHECKING:
    import numpy
    import torch

COPY_BYTES = 256 << 10  # of one write: Linux 6.18 takes 2 to 4 times as long for 1 MB and more
_LARGE = 1 << 28  # bytes of a tensor that is a list of sizes or indices
# torch's names; which bits are all ones in what is not finite
_NOT_FINITE = {
    "float8_e4m3fn": ("u1", 0x7F),
    "float8_e5m2": ("u1", 0x7C),
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F800000),
    "float64": ("<u8", 0x7FF0000000000000),
}
_RESTORE = "Download or copy it again."
_MIXED = "The directory mixes two checkpoints: download or copy one into an empty directory."


def all_finite(values: "torch.Tensor") -> bool:
    """Say whether floats of any shape and width hold no NaN and no infinity.

    The extremes tell it in one pass: torch's `aminmax` gives NaN where there is one. It has no
    8-bit floats.
    """
    import torch

    if values.dtype.itemsize == 1:
        return bool(values.isfinite().all())
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def finite_bytes(data: "memoryview | bytes", dtype_name: str) -> bool:
    """Say whether the bytes of a tensor hold no NaN and no infinity; True where it is no floats.

    Their exponents are all ones, which is seen without torch, in every width (`float8_e4m3fn` has
    NaN alone, in which all bits but the sign are ones).
    """
    import numpy as np

    if dtype_name not in _NOT_FINITE:
        return True
    width, ones = _NOT_FINITE[dtype_name]
    values = np.frombuffer(data, width)
    return not values.size or int((values & values.dtype.type(ones)).max()) < ones


def in_pieces(tensors: "Iterable[torch.Tensor]") -> Iterator[memoryview]:
    """Yield the bytes of tensors, one after the other, in pieces that a core's cache holds.

    It serves readers of formats whose tensors are computed, some rows at a time.
    """
    import torch

    for tensor in tensors:
        view = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(view), COPY_BYTES):
            yield view[start : start + COPY_BYTES]


class CheckpointReader:
    """Tensors of a directory with model.safetensors, with shards and their index, or of one file.

    All headers are read and checked at once; data are read by `get` only.

    Attributes:
        directory: the directory read.
        tensors: every tensor's `TensorInfo` by name, in the order of the files.
        files: the weight files, in order.
        metadata: `__metadata__` of all headers together.
    """

    _metadata: list[dict[str, str]] = []  # of each file; none in formats that hold their config

    def __init__(self, directory: str | Path, only: str | None = None) -> None:
        """Read and check the headers.

        Args:
            directory: a local directory (see `resolve_model_dir` for Hub ids).
            only: name of the one file to read; by default all that the directory's index lists.

        Raises:
            CheckpointError: no safetensors weights, a missing, truncated or damaged shard, or an
                index that contradicts the shards.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory. Give that of a model.")
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._metadata = []
        index = self.directory / INDEX_FILE
        single = self.directory / (only or SINGLE_FILE)
        # transformers prefers the single file where both are there
        if only is not None or single.exists():
            self.files = [single]
            self.tensors, self.metadata = read_header(single)
            self._metadata = [self.metadata]
        elif index.exists():
            self.files = self._read_shards(index)
        else:
            raise CheckpointError(_no_weights(self.directory))

    def _read_shards(self, index: Path) -> list[Path]:
        weight_map = read_as(index, Index)["weight_map"]
        if not weight_map:
            raise CheckpointError(f"{index}: its weight_map names no tensor. {_RESTORE}")
        for name, shard in weight_map.items():
            _check_shard_name(index, name, shard)
        files = [self.directory / shard for shard in sorted(set(weight_map.values()))]
        for path in files:
            if not path.exists():
                raise CheckpointError(f"{path}: missing, but {INDEX_FILE} names it. {_RESTORE}")
            tensors, metadata = read_header(path)
            self._metadata.append(metadata)
            self.metadata |= metadata
            for name, info in tensors.items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name} is also in {self.tensors[name].file.name}. "
                        "Each tensor belongs in one shard: remove the stale one."
                    )
                if weight_map.get(name) != path.name:
                    raise CheckpointError(
                        f"{path}: holds tensor {name}, which {INDEX_FILE} places in "
                        f"{weight_map.get(name, 'no shard')}. {_MIXED}"
                    )
                self.tensors[name] = info
        lost = [name for name in weight_map if name not in self.tensors]
        if lost:
            raise CheckpointError(
                f"{index}: places tensor {lost[0]} in {weight_map[lost[0]]}, which does not hold "
                f"it ({len(lost)} such). {_MIXED}"
            )
        return files

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape and place of a tensor.

        Raises:
            CheckpointError: there is no such tensor.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.directory}: no tensor {name}. The checkpoint is incomplete: write or copy "
                "it again."
            )
        return self.tensors[name]

    def plan(self, names: Iterable[str]) -> dict[str, tuple["torch.dtype", tuple[int, ...]]]:
        """Return dtype and shape of some tensors, as `writer` plans them."""
        infos = map(self.info, names)
        return {info.name: (info.dtype, info.shape) for info in infos}

    def digest(self, data: bytes = b"", **facts: Any) -> str:
        """Hash what decides a result that is made of this model, to 64 hexadecimal digits.

        Args:
            data: what is read beside the model, such as calibration text.
            facts: settings and the like; files count by name, size and time of change.
        """
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        facts = {"files": stats, "config": self.config, **facts}
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode() + data).hexdigest()

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor into fresh memory, in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file changed since it was opened.
        """
        import torch

        info = self.info(name)
        try:
            data = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
        except (RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{info.file}: tensor {name} has {info.nbytes} bytes, more than there is memory "
                "for. Use a machine with more memory, or copy the file again if it is damaged."
            ) from error
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            self._fill(file, view, info)
        return data.view(info.dtype).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw bytes of a tensor in pieces, each valid until the next is asked for."""
        info = self.info(name)
        buffer = memoryview(bytearray(min(info.nbytes, COPY_BYTES)))
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            left = info.nbytes
            while left:
                piece = buffer[: min(left, len(buffer))]
                self._fill(file, piece, info)
                yield piece
                left -= len(piece)

    def check_finite(self, name: str) -> None:
        """Read a tensor of floats through, in pieces; others are not read.

        Raises:
            CheckpointError: it holds NaN or infinity.
        """
        if self.info(name).is_float:
            for _ in self.finite_chunks(name):
                pass

    def integers(self, name: str) -> "numpy.ndarray":
        """Read a small tensor of integers, such as a shape, without torch.

        Raises:
            CheckpointError: there is no such tensor, it is large or not of integers, or its file
                changed since it was opened.
        """
        import numpy as np

        info = self.info(name)
        if "int" not in info.dtype_name or info.nbytes > _LARGE:
            raise CheckpointError(
                f"{info.file}: {name}: expected integers, at most {_LARGE} bytes of them, found "
                f"{info.nbytes} bytes of {info.dtype_name}. {_RESTORE}"
            )
        data = b"".join(bytes(chunk) for chunk in self.chunks(name))
        return np.frombuffer(data, info.dtype_name).reshape(info.shape)

    def finite_chunks(self, name: str) -> Iterator[memoryview]:
        """Yield `chunks`, each of which is looked at first.

        Raises:
            CheckpointError: it is a tensor of floats with NaN or infinity in it.
        """
        info = self.info(name)
        for chunk in self.chunks(name):
            if not finite_bytes(chunk, info.dtype_name):
                raise CheckpointError(
                    f"{info.file}: {name} holds NaN or infinity: the file is damaged, or "
                    "training diverged. Copy it again, or use an earlier checkpoint."
                )
            yield chunk

    @staticmethod
    def _fill(file: FileIO, view: memoryview, info: TensorInfo) -> None:
        """Read until the view is full: some file systems give less than they are asked for."""
        while view:
            count = file.readinto(view) or 0
            if count == 0:
                raise CheckpointError(
                    f"{info.file}: ended while tensor {info.name} was read. "
                    "It changed while it was in use: run again."
                )
            view = view[count:]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The directory's config.json.

        Raises:
            CheckpointError: it is missing or not a JSON object, or a key has a value of another
                type.
        """
        return read_as(self.directory / CONFIG_FILE, ConfigFile)

    def check_bound(self) -> bool:
        """Compare config.json with what the tensors were written for (see `binding`).

        Returns:
            False if a file's metadata do not say it: another program, or an earlier release of
            this one, wrote it.

        Raises:
            CheckpointError: names the keys that differ.
        """
        path = self.directory / CONFIG_FILE
        return all([check_bound(metadata, self.config, path) for metadata in self._metadata])


def _check_shard_name(index: Path, name: str, shard: Any) -> None:
    # a name with a separator could point anywhere on the disk
    if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard or ":" in shard:
        raise CheckpointError(
            f"{index}: weight_map places {name} in {shard!r}; expected the bare name of a file "
            "in the same directory. Do not use this checkpoint unless you trust its origin."
        )
    if not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: weight_map places {name} in {shard!r}; only .safetensors files are read. "
            "Load it with transformers in an environment that you trust, then save_pretrained."
        )


def _no_weights(directory: Path) -> str:
    start = f"{directory}: no {SINGLE_FILE} and no {INDEX_FILE}"
    if (directory / ADAPTER_CONFIG_FILE).exists():
        return (
            f"{start}: this is an adapter. Merge it first, `qalora merge {directory} --out DIR`, "
            "and give DIR. (`qalora export --format lora` takes the adapter itself.)"
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        return (
            f"{start}, only pickle files (.bin, .pt), which can run code and are never read. "
            "Convert them in an environment that you trust: load with transformers, then "
            "save_pretrained."
        )
    return f"{start}. Give a directory written by save_pretrained."
