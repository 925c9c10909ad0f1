"""Read a GGUF file as a quantized base, without llama.cpp.

Linear layers in the blocks whose type is affine (`decode.BLOCK_TYPES`) are quantized layers: their
codes, scales and minima are taken over as they are. Where there is none, the K-quants are
(`k_quants`), with scales and minima in fp32; they take nothing back. Everything else is dense: 16
and 32-bit tensors as they are stored, others as gguf-py dequantizes them, in fp32.

The tokenizer, the chat template and config.json are rebuilt from the file's metadata.
"""

from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qalora_kernels import PackedWeight, QuantSpec, load_offsets

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError
from ...files.reader import CheckpointReader, in_pieces
from ...files.safetensors import TensorInfo, tensor_nbytes
from . import FORMAT
from .blocks import BLOCK
from .decode import BLOCK_TYPES, BlockType, read_minima, read_scales, write_words
from .file import open_gguf
from .k_quants import K_TYPES, read_k
from .metadata import interleave
from .model import ROPE_FACTORS, Model
from .vocabulary import Vocabulary

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_ROWS_BYTES = 1 << 20  # of one step of decoding: it stays in a core's cache
_OTHER_FILE = (
    "Take a file of the same model in Q4_1, Q4_0, Q5_1, Q5_0, Q8_0 or Q4_K_M, or make one: "
    "`llama-quantize --allow-requantize IN.gguf OUT.gguf Q4_1` (from a 16-bit file, if any)."
)


class GGUFReader(CheckpointReader):
    """The tensors of one GGUF file by Hugging Face's names, in Hugging Face's order of rows.

    Attributes:
        directory: the file.
        tensors: dense tensors as `get` gives them; of a quantized layer `<layer>.weight`, which is
            its blocks, uint8 [N, bytes of a row], as they lie in the file.
        model: what the metadata says.
    """

    def __init__(self, path: Path) -> None:
        """Read and check the metadata.

        Raises:
            CheckpointError: damaged, or a model or a type of tensor that is not read.
        """
        self.directory, self.files, self.metadata = path, [path], {}
        gguf, reader = FORMAT.library("gguf"), open_gguf(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise CheckpointError(f"{path}: a big-endian GGUF file, which is not read.")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.kinds = {name: tensor.tensor_type.name for name, tensor in self._stored.items()}
        self._check_kinds()
        self.model = Model(path, fields, self._stored)
        self.vocabulary = Vocabulary(path, fields)
        kinds = {self.kind(f"{name}.weight") for name in self.model.linears}
        self.layer_kinds = kinds & BLOCK_TYPES.keys() or kinds & K_TYPES.keys()
        if ROPE_FACTORS in self._stored:
            self.model.set_rope_factors(torch.from_numpy(np.array(self._stored[ROPE_FACTORS].data)))
        self.tensors = {name: self._info(name) for name in self.model.names}

    def _check_kinds(self) -> None:
        known = {*_PLAIN, *BLOCK_TYPES, *_K_QUANTS}
        for name, kind in self.kinds.items():
            if kind not in known:
                raise CheckpointError(
                    f"{self.directory}: {name} is in {kind}, which is not read. {_OTHER_FILE}"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json, rebuilt from the metadata."""
        return self.model.config

    def kind(self, name: str) -> str:
        """Return GGUF's type of a tensor, such as "Q4_1"."""
        return self.kinds[self.model.names[name]]

    def is_layer(self, name: str) -> bool:
        """Say whether a tensor is the weight of a quantized layer."""
        kind, layer = self.kind(name), name.removesuffix(".weight")
        return kind in self.layer_kinds and layer in self.model.linears

    def place(self, name: str) -> tuple[int, tuple[int, int]]:
        """Return where a tensor's data start in the file, and their [rows, bytes of a row]."""
        stored = self._stored[self.model.names[name]]
        rows = int(np.prod(stored.shape[1:]))
        return int(stored.data_offset), (rows, int(stored.n_bytes) // rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in Hugging Face's model."""
        return tuple(int(size) for size in reversed(self._stored[self.model.names[name]].shape))

    def _info(self, name: str) -> TensorInfo:
        start, rows = self.place(name)
        if self.is_layer(name):
            return TensorInfo(name, "uint8", rows, self.directory, start, rows[0] * rows[1])
        stored, shape = _PLAIN.get(self.kind(name), "float32"), self.shape(name)
        nbytes = tensor_nbytes(getattr(torch, stored), shape)
        return TensorInfo(name, stored, shape, self.directory, start, nbytes)

    def blocks(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield a tensor's bytes as they lie in the file: (rows, uint8 [rows, bytes of a row])."""
        start, (rows, width) = self.place(name)
        step = max(1, _ROWS_BYTES // width)
        info = self.info(name)
        with self.directory.open("rb", buffering=0) as file:
            file.seek(start)
            for first in range(0, rows, step):
                part = slice(first, min(first + step, rows))
                data = torch.empty(part.stop - first, width, dtype=torch.uint8)
                view, done = memoryview(data.numpy()).cast("B"), 0  # type: ignore[arg-type]
                while done < len(view):
                    done += self._read(file, view[done:], info)
                yield part, data

    def heads(self, name: str) -> int | None:
        """Return into how many heads the rows of a tensor are interleaved; None if they are not."""
        part = name.split(".")[-2]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
        return self.config[heads] if heads and self.model.architecture.permuted else None

    def row_order(self, name: str) -> torch.Tensor | None:
        """Return which row of the file each row is, int64 [N]; None where they are the same."""
        heads = self.heads(name)
        if heads is None:
            return None
        rows = torch.arange(self.shape(name)[0])
        return torch.empty_like(rows).index_copy_(0, interleave(rows, heads), rows)

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield a dense tensor's rows, in order."""
        kind, dtype = self.kind(name), self.info(name).dtype
        order = self.row_order(name)
        if order is not None:  # the few that are in another order fit into memory
            whole = torch.cat([self._dense(kind, dtype, raw) for _, raw in self.blocks(name)])
            yield whole.reshape(self.shape(name))[order]
            return
        less = self.model.architecture.norm_plus_one and name.endswith("norm.weight")
        for _, raw in self.blocks(name):
            rows = self._dense(kind, dtype, raw)
            yield rows - 1 if less else rows

    def _dense(self, kind: str, dtype: torch.dtype, raw: torch.Tensor) -> torch.Tensor:
        if kind in _PLAIN:
            return raw.view(dtype)
        gguf = FORMAT.library("gguf")
        values = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor, see `tensors`.

        Raises:
            CheckpointError: there is no such tensor, or the file changed since it was opened.
        """
        info = self.info(name)
        if self.is_layer(name):
            return torch.cat([raw for _, raw in self.blocks(name)])
        return torch.cat([piece.reshape(-1) for piece in self._pieces(name)]).reshape(info.shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a dense tensor, in pieces as those of any other file are."""
        yield from in_pieces(self._pieces(name))


class GGUFCheckpoint(QuantizedCheckpoint):
    """A GGUF file as a quantized base; minima are stored, and exact."""

    format = FORMAT.name
    integers = "weight"
    reader: GGUFReader

    def _open_reader(self, path: Path) -> CheckpointReader:
        return GGUFReader(path)

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        reader = self.reader
        names = [name.removesuffix(".weight") for name in reader.tensors if reader.is_layer(name)]
        kinds = Counter(reader.kinds.values())
        self.facts = {"types": ", ".join(f"{kind}: {n}" for kind, n in sorted(kinds.items()))}
        if not names:
            raise CheckpointError(
                f"{reader.directory}: none of its layers is in a type that can be a base (its "
                f"tensors: {self.facts['types']}). {_OTHER_FILE}"
            )
        grids = {name: self._grid(name) for name in names}
        usual = Counter(grids.values()).most_common(1)[0][0]
        keys = ("bits", "group_size")
        config = QALoRAQuantConfig(
            *usual,
            offsets_at="minimum",
            scales_dtype="float16" if reader.layer_kinds <= BLOCK_TYPES.keys() else "float32",
            dynamic={
                name: dict(zip(keys, own, strict=True))
                for name, own in grids.items()
                if own != usual
            },
            base={"name_or_path": reader.directory.name},
        )
        shapes = {name: reader.shape(f"{name}.weight") for name in names}
        return config, {name: config.spec_for(name, *reversed(shapes[name])) for name in names}

    def _grid(self, name: str) -> tuple[int, int]:
        """Return a layer's bits and group_size."""
        kind = self.reader.kind(f"{name}.weight")
        if kind in K_TYPES:
            return K_TYPES[kind].bits, K_TYPES[kind].group_size
        return BLOCK_TYPES[kind].bits, BLOCK

    def block_type(self, name: str) -> BlockType | None:
        """Return the type of a layer's blocks; None of a K-quant."""
        return BLOCK_TYPES.get(self.reader.kind(f"{name}.weight"))

    def takes_back(self, name: str) -> tuple[str, ...]:
        """Return what a layer takes back: all where a type has a minimum, scales of others."""
        kind = self.block_type(name)
        if kind is None:
            return ()
        return FORMAT.takes_back if kind.zero is None or kind.grown else ("scales",)

    def write_side_files(self, target: Path) -> None:
        """Write tokenizer, chat template and generation config, from the metadata."""
        self.reader.vocabulary.save(target)

    def _read_layer(self, name: str) -> PackedWeight:
        spec, kind = self.layers[name], self.block_type(name)
        groups = (spec.num_groups, spec.out_features)
        words = torch.empty(spec.packed_rows, spec.out_features, dtype=torch.int32)
        scales, minima = (torch.empty(groups, dtype=spec.scales_dtype) for _ in range(2))
        for rows, raw in self.reader.blocks(f"{name}.weight"):
            if kind is None:
                parts = read_k(self.reader.kind(f"{name}.weight"), raw)
                words[:, rows], scales[:, rows], minima[:, rows] = (part.t() for part in parts)
                continue
            blocks = raw.view(len(raw), spec.num_groups, kind.nbytes)
            write_words(kind, blocks, words[:, rows])
            scales[:, rows] = read_scales(kind, blocks).t()
            minima[:, rows] = read_minima(kind, blocks).t()
        order = self.reader.row_order(f"{name}.weight")
        if order is not None:
            words, scales, minima = (part[:, order] for part in (words, scales, minima))
        wide = scales.float()
        return PackedWeight(words, wide, load_offsets(minima, wide, spec).float(), None, spec)

    def qweight(self, name: str) -> torch.Tensor:
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        return self._read_layer(name).qweight


open_checkpoint = GGUFCheckpoint
