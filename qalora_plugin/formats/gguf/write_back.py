"""Write merged minima and scales back into a copy of a GGUF file.

Where a layer's type has a minimum, bytes 0-3 of its blocks are new: d and m. Where it has none
(Q4_0, Q5_0, Q8_0) and the merged minimum is still -d * (code of 0), bytes 0-1 are. Else Q4_0 grows
into Q4_1, and Q5_0 into Q5_1: then the file is written anew by gguf-py, with every key-value and
every other tensor as it was.
"""

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

from qalora_kernels import PackedWeight, store_offsets

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.validate import check_values
from ...errors import CheckpointError
from ...files.atomic import atomic_file, cannot_write, check_target
from ...files.reader import COPY_BYTES, in_pieces
from ...files.writer import made_ahead
from ..export import ExportResult, Progress
from ..write_back import check_layer, check_same_model
from . import FORMAT
from .decode import minima_of, read_minima
from .file import open_gguf
from .headers import BLOCK_TYPES, BlockType
from .metadata import interleave
from .read import GGUFCheckpoint

_EXACT = "Exact: minima and scales are written back, everything else is the source's."


class _Layer(NamedTuple):
    """A layer of the source, and what is new in it.

    Args:
        blocks: its bytes as they lie in the file, see `GGUFReader.blocks`.
        new: by half of a block's head (0: d, 1: m), where anything is new: the numbers fp16 [N, B],
            in the file's order of rows, and where they differ, bool [N, B].
    """

    blocks: list[tuple[slice, torch.Tensor]]
    new: dict[int, tuple[torch.Tensor, torch.Tensor]]


def write_back(
    source: QuantizedCheckpoint, merged: QuantizedCheckpoint, out: Path, progress: Progress | None
) -> ExportResult:
    """Write the file; see `formats.original`.

    Raises:
        OutputError: the target exists, or cannot be written.
        CheckpointError: the merged model is not the source's, or the file cannot hold it.
    """
    base = cast(GGUFCheckpoint, source)
    target = check_target(out)
    check_same_model(source, merged)
    grown = [name for name in base.layers if _grows(base, merged, name)]
    with atomic_file(target) as partial:
        if grown:
            _write_grown(base, merged, set(grown), partial, progress)
        else:
            _patch_copy(base, merged, partial, progress)
    exactness = _EXACT
    if grown:
        kinds = sorted({str(_affine(base, name).grown) for name in grown})
        exactness += f" {len(grown)} layers without a minimum grew into {' and '.join(kinds)}."
    return ExportResult(target, FORMAT.name, len(base.layers), exactness)


def _change(base: GGUFCheckpoint, merged: QuantizedCheckpoint, name: str) -> _Layer:
    """Compare a layer with the merged one, both as they are stored; the rest of the file stays."""
    spec = base.layers[name]
    if merged.layers[name] != spec:
        raise CheckpointError(
            f"{merged.directory}: {name} has another grid than in {base.directory}: expected "
            f"{spec}, found {merged.layers[name]}. Export to another format."
        )
    blocks = list(base.reader.blocks(f"{name}.weight"))
    words, scales, minima = base.decode(name, blocks)
    before = PackedWeight(words, scales, minima, None, spec)
    scales, minima = (merged.reader.get(f"{name}.{part}") for part in ("scales", "offsets"))
    after = PackedWeight(words, scales, minima, merged.g_idx(name), spec)
    check_values(merged.where(name), after)
    check_layer(base, merged, name, before, after)
    heads = base.reader.heads(f"{name}.weight")

    def rows(part: torch.Tensor) -> torch.Tensor:
        return (part.t() if heads is None else interleave(part.t(), heads)).contiguous()

    new = {}
    changed = after.scales != before.scales
    if changed.any():
        new[0] = rows(scales), rows(changed)
    changed = changed | (after.offsets != before.offsets)
    if changed.any():
        new[1] = rows(minima), rows(changed)
    return _Layer(blocks, new)


def _grows(base: GGUFCheckpoint, merged: QuantizedCheckpoint, name: str) -> bool:
    """Say whether a layer needs a minimum that its type does not have.

    Raises:
        CheckpointError: and there is no type that has one.
    """
    kind = base.block_type(name)
    if kind is None or kind.zero is None:
        return False
    after = merged.layer(name, integers=False)
    minima = store_offsets(after.offsets, after.scales, after.spec)
    if torch.equal(minima, minima_of(kind, after.scales.to(torch.float16))):
        return False
    if kind.grown is None:
        raise CheckpointError(
            f"{merged.directory}: {name}: its offsets have changed, and "
            f"{base.reader.kind(f'{name}.weight')} has no minimum. Train with adapt='scales' or "
            "QALoRAConfig(write_back=True), or export to another format."
        )
    return True


def _blocks(
    base: GGUFCheckpoint, name: str, layer: _Layer, grown: BlockType | None
) -> Iterator[torch.Tensor]:
    """Yield a layer's rows as they are written, uint8 [rows, bytes of a row]."""
    kind = own = _affine(base, name)
    for rows, raw in layer.blocks:
        blocks = raw.view(len(raw), -1, kind.nbytes)
        if grown is not None:
            wider = torch.empty(*blocks.shape[:2], grown.nbytes, dtype=torch.uint8)
            wider[..., :2], wider[..., 4:] = blocks[..., :2], blocks[..., 2:]
            wider.view(torch.float16)[..., 1] = read_minima(kind, blocks)
            blocks, kind = wider, grown
        halves = blocks.view(torch.float16)
        for at, (numbers, changed) in layer.new.items():
            if at == 0 or kind.zero is None:  # else there is no m
                halves[..., at] = torch.where(changed[rows], numbers[rows], halves[..., at])
        yield blocks.reshape(len(raw), -1)
        kind = own


def _affine(base: GGUFCheckpoint, name: str) -> BlockType:
    kind = base.block_type(name)
    assert kind is not None  # a K-quant takes nothing back, and is never patched
    return kind


def _patch_copy(
    base: GGUFCheckpoint, merged: QuantizedCheckpoint, partial: Path, progress: Progress | None
) -> None:
    """Write the source's bytes with new ones where layers have changed, each once and in order."""
    places = {name: base.reader.place(f"{name}.weight") for name in base.layers}
    names = sorted(places, key=places.__getitem__)
    layers = made_ahead(lambda name: _change(base, merged, name), names)
    done = 0  # bytes
    try:
        with base.directory.open("rb") as old, partial.open("wb") as new, closing(layers):
            for count, (name, layer) in enumerate(zip(names, layers, strict=True), start=1):
                if layer.new:
                    start, (rows, width) = places[name]
                    _copy(old, new, done, start)
                    for piece in in_pieces(_blocks(base, name, layer, None)):
                        new.write(piece)
                    done = start + rows * width
                if progress is not None:
                    progress(count, len(places))
            _copy(old, new, done, base.directory.stat().st_size)
    except OSError as error:
        raise cannot_write(partial, error) from error


def _copy(old: BinaryIO, new: BinaryIO, start: int, stop: int) -> None:
    """Copy some bytes of a file to the end of another."""
    old.seek(start)
    while start < stop:
        piece = old.read(min(COPY_BYTES, stop - start))
        if not piece:
            raise CheckpointError(f"{old.name}: became shorter while it was read. Run it again.")
        new.write(piece)
        start += len(piece)


def _write_grown(
    base: GGUFCheckpoint,
    merged: QuantizedCheckpoint,
    grown: set[str],
    partial: Path,
    progress: Progress | None,
) -> None:
    """Write the file anew: tensors in the source's order, one in memory at a time."""
    gguf = FORMAT.library("gguf")
    source = open_gguf(base.directory)
    writer = gguf.GGUFWriter(partial, base.reader.model.architecture.name)
    _copy_fields(writer, source)
    writer.data_alignment = source.alignment  # which general.alignment, copied too, states
    layers = {base.reader.model.names[f"{name}.weight"]: name for name in base.layers}
    for tensor in source.tensors:
        kind, name = tensor.tensor_type, layers.get(tensor.name)
        if name in grown:
            kind = gguf.GGMLQuantizationType[str(_affine(base, str(name)).grown)]
        shape = gguf.quant_shape_to_byte_shape([int(n) for n in reversed(tensor.shape)], kind)
        nbytes = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.uint8, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(source.tensors, start=1):
        name = layers.get(tensor.name)
        if name is None:
            data = np.frombuffer(tensor.data.tobytes(), dtype=np.uint8)
        else:
            wider = BLOCK_TYPES[str(_affine(base, name).grown)] if name in grown else None
            pieces = _blocks(base, name, _change(base, merged, name), wider)
            data = torch.cat(list(pieces)).numpy()
        writer.write_tensor_data(data)
        if progress is not None:
            progress(done, len(source.tensors))
    writer.close()


def _copy_fields(writer: Any, source: Any) -> None:
    """Copy every key-value; the writer made the architecture's already."""
    pack, array = writer._pack_val, FORMAT.library("gguf").GGUFValueType.ARRAY

    def pack_any(value: Any, kind: Any, add_vtype: bool, sub_type: Any = None) -> Any:
        if kind != array or value:
            return pack(value, kind, add_vtype, sub_type)
        # gguf-py writes no empty array
        return struct.pack("<IIQ", kind, sub_type, 0)

    writer._pack_val = pack_any
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, inner = field.types[0], None
        if kind == array:
            inner = field.types[-1] if field.data else int(field.parts[-2][0])
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
