"""Read a GGUF file as a quantized base, without llama.cpp.

Linear layers in the blocks whose type is affine (`decode.BLOCK_TYPES`) are quantized layers: their
codes, scales and minima are taken over as they are. Where there is none, the K-quants are
(`k_quants`), with scales and minima in fp32; they take nothing back. Everything else is dense: 16
and 32-bit tensors as they are stored, others as gguf-py dequantizes them, in fp32.

The tokenizer, the chat template and config.json are rebuilt from the file's metadata.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qalora_kernels import PackedWeight, load_offsets

from ...files.reader import CheckpointReader, in_pieces
from ...files.safetensors import TensorInfo, tensor_nbytes
from . import FORMAT
from .decode import read_minima, read_scales, write_words
from .headers import PLAIN, GGUFGrids, GGUFHeaders
from .k_quants import read_k
from .metadata import interleave
from .model import ROPE_FACTORS, Model
from .vocabulary import Vocabulary

_ROWS_BYTES = 1 << 20  # of one step of decoding: it stays in a core's cache


class GGUFReader(GGUFHeaders):
    """The tensors of one GGUF file by Hugging Face's names, in Hugging Face's order of rows.

    Attributes:
        tensors: dense tensors as `get` gives them; of a quantized layer `<layer>.weight`, which is
            its blocks, uint8 [N, bytes of a row], as they lie in the file.
        model: what the metadata says.
        fields: all key-values.
    """

    _reads_lists = True

    def _read_names(self) -> dict[str, str]:
        self.model = Model(self.directory, self.family, self.fields, self._stored)
        self.vocabulary = Vocabulary(self.directory, self.fields)
        if ROPE_FACTORS in self._stored:
            self.model.set_rope_factors(torch.from_numpy(np.array(self._stored[ROPE_FACTORS].data)))
        return self.model.names

    @cached_property
    def config(self) -> dict[str, Any]:
        """The model's config.json, rebuilt from the metadata."""
        return self.model.config

    def _is_linear(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.model.linears

    def _info(self, name: str) -> TensorInfo:
        if self.is_layer(name):
            return super()._info(name)
        start, _ = self.place(name)
        stored, shape = PLAIN.get(self.kind(name), "float32"), self.shape(name)
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
                self._fill(file, memoryview(data.numpy()).cast("B"), info)  # type: ignore[arg-type]
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
        if kind in PLAIN:
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
        """Yield the bytes of a dense tensor, in pieces."""
        yield from in_pieces(self._pieces(name))


class GGUFCheckpoint(GGUFGrids):
    """A GGUF file as a quantized base; minima are stored, and exact."""

    reader: GGUFReader

    def _open_reader(self, path: Path) -> CheckpointReader:
        return GGUFReader(path)

    def write_side_files(self, target: Path) -> None:
        """Write tokenizer, chat template and generation config, from the metadata."""
        self.reader.vocabulary.save(target)

    def _read_layer(self, name: str) -> PackedWeight:
        words, scales, minima = self.decode(name, self.reader.blocks(f"{name}.weight"))
        wide, spec = scales.float(), self.layers[name]
        return PackedWeight(words, wide, load_offsets(minima, wide, spec).float(), None, spec)

    def decode(
        self, name: str, blocks: Iterable[tuple[slice, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return one layer as it is stored: `qweight`, and scales and minima [G, N] in their dtype.

        Those are fp16, of a K-quant fp32.

        Args:
            name: of the layer.
            blocks: its bytes, see `GGUFReader.blocks`.
        """
        spec, kind = self.layers[name], self.block_type(name)
        groups = (spec.num_groups, spec.out_features)
        words = torch.empty(spec.packed_rows, spec.out_features, dtype=torch.int32)
        scales, minima = (torch.empty(groups, dtype=spec.scales_dtype) for _ in range(2))
        for rows, raw in blocks:
            if kind is None:
                read = read_k(self.reader.kind(f"{name}.weight"), raw)
                words[:, rows], scales[:, rows], minima[:, rows] = (part.t() for part in read)
                continue
            parts = raw.view(len(raw), spec.num_groups, kind.nbytes)
            write_words(kind, parts, words[:, rows])
            scales[:, rows] = read_scales(kind, parts).t()
            minima[:, rows] = read_minima(kind, parts).t()
        order = self.reader.row_order(f"{name}.weight")
        if order is not None:
            words, scales, minima = (part[:, order] for part in (words, scales, minima))
        return words, scales, minima

    def qweight(self, name: str) -> torch.Tensor:
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        return self._read_layer(name).qweight


open_checkpoint = GGUFCheckpoint
