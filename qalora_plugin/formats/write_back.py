"""Give a merged model back to the file that its base was read from.

A format's module `write_back` patches a copy of the source: minima, biases or scales change, and
nothing else does. This is what the formats share: checks that the merged model is that source with
its grid moved, and a copy of a directory whose tensors are overwritten in place.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qalora_kernels import PackedWeight

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.format import Format
from ..checkpoint.source import source_files
from ..errors import CheckpointError
from ..files.atomic import AtomicDirectory, cannot_write
from ..files.reader import CheckpointReader, in_pieces
from .export import ExportResult, Progress

_TUNED_ANOTHER = "It was merged into another base, or its base was quantized again."


def check_same_model(source: QuantizedCheckpoint, merged: QuantizedCheckpoint) -> None:
    """Check that a merged model has the source's layers, grids and dense tensors; headers first.

    Raises:
        CheckpointError: a layer or tensor is missing, surplus, or another one.
    """
    different = source.layers.keys() ^ merged.layers.keys()
    if different:
        raise _another(merged, sorted(different)[0], "is a quantized layer in one of them only")
    for name, spec in source.layers.items():
        found = merged.layers[name]
        if (found.bits, found.group_size) != (spec.bits, spec.group_size):
            raise CheckpointError(
                f"{merged.directory}: {name}: bits and group_size are {found.bits} and "
                f"{found.group_size}, in {source.directory} {spec.bits} and {spec.group_size}: the "
                "adapter pooled over smaller groups, which the file cannot hold. Export to "
                "another format."
            )
    different = set(source.dense_names) ^ set(merged.dense_names)
    if different:
        raise _another(merged, sorted(different)[0], "is a tensor of one of them only")
    for name in source.dense_names:
        if not _equal(source.reader, merged.reader, name):
            raise CheckpointError(
                f"{merged.directory}: {name} is not that of {source.directory}: it was trained as "
                "a whole (modules_to_save), and only scales and offsets are written back. Export "
                "to another format."
            )


def _equal(source: CheckpointReader, merged: CheckpointReader, name: str) -> bool:
    one, other = source.info(name), merged.info(name)  # merged is in our format
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and _same_bytes(source.chunks(name), merged, name)


def _same_bytes(pieces: Iterable[memoryview], merged: CheckpointReader, name: str) -> bool:
    info = merged.info(name)
    with info.file.open("rb") as file:
        file.seek(info.start)
        # views are compared one by one, bytes at once
        return all(bytes(piece) == file.read(len(piece)) for piece in pieces)


def _another(merged: QuantizedCheckpoint, name: str, how: str) -> CheckpointError:
    return CheckpointError(f"{merged.directory}: {name} {how}. {_TUNED_ANOTHER}")


def changed_layer(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, name: str
) -> tuple[PackedWeight, PackedWeight]:
    """Read one layer of both; integers and groups are the source's.

    Returns:
        The source's and the merged one, whose `qweight` has a shape alone.

    Raises:
        CheckpointError: see `check_layer`.
    """
    before, after = source.layer(name), merged.layer(name, integers=False)
    check_layer(source, merged, name, before, after)
    return before, after


def check_layer(
    source: QuantizedCheckpoint,
    merged: QuantizedCheckpoint,
    name: str,
    before: PackedWeight,
    after: PackedWeight,
) -> None:
    """Check that a merged layer is the source's with its grid moved, as far as it may move.

    Args:
        source: the base.
        merged: what became of it.
        name: of the layer.
        before: the source's layer.
        after: the merged one, whose `qweight` needs a shape alone; scales and offsets as in
            `before`, in the stored dtypes or wider ones.

    Raises:
        CheckpointError: the integers are others, or the layer is one that takes nothing back and
            has changed.
    """
    same_groups = (before.g_idx is None) == (after.g_idx is None) and (
        before.g_idx is None or torch.equal(before.g_idx, after.g_idx)  # type: ignore[arg-type]
    )
    same_shape = before.qweight.shape == after.qweight.shape
    integers, stored = in_pieces([before.qweight]), f"{name}.{merged.integers}"
    if not (same_groups and same_shape and _same_bytes(integers, merged.reader, stored)):
        raise _another(merged, name, f"has other integers than in {source.directory}")
    modes = source.takes_back(name)
    scales = torch.equal(before.scales, after.scales)
    zeros = torch.equal(before.offsets, after.offsets)
    if not scales and not {"scales", "both"} & set(modes):
        raise _frozen(merged, name, "scales")
    if not zeros and not modes:
        raise _frozen(merged, name, "offsets")


def _frozen(merged: QuantizedCheckpoint, name: str, part: str) -> CheckpointError:
    return CheckpointError(
        f"{merged.directory}: {name}: its {part} have changed, and the source's format cannot take "
        "that back. Train with QALoRAConfig(write_back=True), or export to another format."
    )


def write_scales_back(
    source: QuantizedCheckpoint,
    merged: QuantizedCheckpoint,
    out: Path,
    format: Format,
    progress: Progress | None,
    *,
    part: str = "scales",
    transposed: bool = False,
) -> ExportResult:
    """Patch the scales of a source with integer zero-points, which stay.

    Args:
        source: the base.
        merged: what became of it.
        out: the directory to make.
        format: of the source.
        progress: called with (layers written, layers in all).
        part: last part of the name of a layer's scales.
        transposed: whether they are stored as [N, G].

    Raises:
        CheckpointError: an offset is not scale * (mid - z) with the source's zero-point z, or the
            dtype of the source's scales does not hold the merged ones.
    """
    check_same_model(source, merged)
    with patched_directory(source, out) as patch:
        for done, name in enumerate(source.layers, start=1):
            before, after = changed_layer(source, merged, name)
            zeros = before.offsets / before.scales  # mid - z: exact, they are small integers
            zeros = zeros.where(before.scales != 0, 0.0)
            if not torch.equal(after.scales * zeros, after.offsets):
                raise CheckpointError(
                    f"{merged.directory}: {name}: its zero-points have changed, and "
                    f"{format.grids.holder} stores integers. Train with adapt='scales', or export "
                    "to another format."
                )
            scales = after.scales.to(source.reader.info(f"{name}.{part}").dtype)
            if not torch.equal(scales.float(), after.scales):
                raise CheckpointError(
                    f"{source.where(name)}.{part}: {scales.dtype} does not hold the merged scales "
                    "exactly. Export to another format."
                )
            if not torch.equal(before.scales, after.scales):
                patch.write(f"{name}.{part}", scales.t() if transposed else scales)
            if progress is not None:
                progress(done, len(source.layers))
    exactness = "Exact: scales are written back, integers and zero-points are the source's."
    return ExportResult(out, format.name, len(source.layers), exactness)


class Patch:
    """A copy of a source directory, whose tensors are overwritten in place."""

    def __init__(self, source: QuantizedCheckpoint, directory: Path) -> None:
        self._reader, self._directory = source.reader, directory

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Overwrite a tensor of the source's files.

        Raises:
            ValueError: its dtype or shape is not the source's.
            OutputError: the file cannot be written.
        """
        info = self._reader.info(name)
        found = (tensor.dtype, tuple(tensor.shape))
        if found != (info.dtype, info.shape):
            raise ValueError(f"{name}: expected {(info.dtype, info.shape)}, found {found}")
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        path = self._directory / info.file.name
        try:
            with path.open("r+b") as file:
                file.seek(info.start)
                file.write(data.tobytes())
        except OSError as error:
            raise cannot_write(path, error) from error


@contextmanager
def patched_directory(source: QuantizedCheckpoint, out: Path) -> Iterator[Patch]:
    """Copy every file of a source directory to `out`, which appears when all is patched.

    Raises:
        OutputError: the target is not empty, or cannot be written.
    """
    with AtomicDirectory(out) as partial:
        for name, path in source_files(source).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)  # follows links, as in the Hub's cache
        yield Patch(source, partial)
