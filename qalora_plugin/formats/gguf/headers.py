"""What the headers of a GGUF file say of it as a base, without torch and transformers.

A block is the unit of a row that has numbers of its own: 32 inputs with a scale, and in two types a
minimum; 256 inputs with a scale and a minimum of scales and minima in the K-quants.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qalora_kernels import QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError
from ...files.reader import CheckpointReader, finite_bytes
from ...files.safetensors import TensorInfo
from . import FORMAT
from .file import open_gguf

BLOCK = 32
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""transformers' `model_type` by `general.architecture`."""
# numbers of a file that change what the model computes, of which none is read
_UNREAD = ("expert_count", "attention.scale", "residual_scale", "logit_scale", "embedding_scale")
# where the f16 numbers of a block lie (ggml-common.h)
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
_PIECE = 1 << 22  # bytes of a tensor that are looked at together
_OTHER_FILE = (
    "Take a file of the same model in Q4_1, Q4_0, Q5_1, Q5_0, Q8_0 or Q4_K_M, or make one: "
    "`llama-quantize --allow-requantize IN.gguf OUT.gguf Q4_1` (from a 16-bit file, if any)."
)


@dataclass(frozen=True)
class BlockType:
    """One affine block type, as `decode` reads it.

    Args:
        nbytes: of a block.
        bits: of our container, 4 or 8.
        low: where the low bits start.
        high: where the high bits start; None without.
        zero: the code of weight 0, where there is no minimum.
        grown: the type that also has a minimum; None if there is none.
    """

    nbytes: int
    bits: int
    low: int
    high: int | None = None
    zero: int | None = None
    grown: str | None = None


BLOCK_TYPES = {
    "Q4_0": BlockType(18, 4, 2, zero=8, grown="Q4_1"),
    "Q4_1": BlockType(20, 4, 4),
    "Q5_0": BlockType(22, 8, 6, high=2, zero=16, grown="Q5_1"),
    "Q5_1": BlockType(24, 8, 8, high=4),
    "Q8_0": BlockType(34, 8, 2, zero=128),
}


@dataclass(frozen=True)
class KType:
    """One K-quant, as `k_quants` reads it.

    Args:
        nbytes: of a block.
        bits: of our container, 4 or 8.
        group_size: inputs that share a scale and a minimum.
    """

    nbytes: int
    bits: int
    group_size: int


K_TYPES = {"Q4_K": KType(144, 4, 32), "Q5_K": KType(176, 8, 32), "Q6_K": KType(210, 8, 16)}


def model_class(model_type: str) -> str:
    """Return the name of transformers' class of a causal model."""
    return {"gemma3_text": "Gemma3ForCausalLM"}.get(
        model_type, f"{model_type.capitalize()}ForCausalLM"
    )


class GGUFHeaders(CheckpointReader):
    """The tensors of one GGUF file by the file's names, uint8 [rows, bytes of a row].

    Attributes:
        directory: the file.
        kinds: GGUF's type of each tensor, such as "Q4_1", by the file's name.
        fields: the key-values, but for lists such as the vocabulary.
        layer_kinds: the types of quantized layers.
    """

    _reads_lists = False

    def __init__(self, path: Path) -> None:
        """Read and check the metadata.

        Raises:
            CheckpointError: damaged, or a model or a type of tensor that is not read.
        """
        self.directory, self.files, self.metadata = path, [path], {}
        reader = open_gguf(path)
        gguf = FORMAT.library("gguf")
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise CheckpointError(f"{path}: a big-endian GGUF file, which is not read.")
        lists = gguf.GGUFValueType.ARRAY
        try:
            self.fields = {
                name: field.contents()
                for name, field in reader.fields.items()
                if self._reads_lists or lists not in field.types[:1]
            }
        except ValueError as error:
            raise CheckpointError(
                f"{path}: holds text that is no UTF-8 ({error}). Download or copy it again."
            ) from error
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self.kinds = {name: tensor.tensor_type.name for name, tensor in self._stored.items()}
        self._check_kinds()
        self.family = str(self.fields.get("general.architecture"))
        if self.family not in MODEL_TYPES:
            raise CheckpointError(
                f"{path}: general.architecture {self.family!r} is not read; "
                f"{', '.join(MODEL_TYPES)} are. Quantize the 16-bit model with `qalora quantize`."
            )
        for key in _UNREAD:
            if found := self.fields.get(f"{self.family}.{key}"):
                raise CheckpointError(
                    f"{path}: {self.family}.{key} is {found}: this variant of the architecture is "
                    "not read. Quantize the 16-bit model with `qalora quantize`."
                )
        self._names = self._read_names()
        kinds = {self.kind(name) for name in self._names if self._is_linear(name)}
        self.layer_kinds = kinds & BLOCK_TYPES.keys() or kinds & K_TYPES.keys()
        self.tensors = {name: self._info(name) for name in self._names}

    def _read_names(self) -> dict[str, str]:
        """Return the names of `tensors`, and what the file calls each."""
        return {name: name for name in self._stored}

    def _check_kinds(self) -> None:
        known = PLAIN.keys() | HALVES.keys()
        for name, kind in self.kinds.items():
            if kind not in known:
                raise CheckpointError(
                    f"{self.directory}: {name} is in {kind}, which is not read. {_OTHER_FILE}"
                )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The part of config.json that is known without transformers."""
        return {"architectures": [model_class(MODEL_TYPES[self.family])]}

    def kind(self, name: str) -> str:
        """Return GGUF's type of a tensor, such as "Q4_1"."""
        return self.kinds[self._names[name]]

    def _is_linear(self, name: str) -> bool:
        """Say whether a tensor is a linear layer's weight: in a block every matrix is."""
        rank = len(self._stored[name].shape)
        return name.startswith("blk.") and name.endswith(".weight") and rank == 2

    def is_layer(self, name: str) -> bool:
        """Say whether a tensor is the weight of a quantized layer."""
        return self.kind(name) in self.layer_kinds and self._is_linear(name)

    def place(self, name: str) -> tuple[int, tuple[int, int]]:
        """Return where a tensor's data start in the file, and their [rows, bytes of a row]."""
        stored = self._stored[self._names[name]]
        rows = int(np.prod(stored.shape[1:]))
        return int(stored.data_offset), (rows, int(stored.n_bytes) // rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape in Hugging Face's model; gguf-py lists its axes in reverse."""
        return tuple(int(size) for size in reversed(self._stored[self._names[name]].shape))

    def _info(self, name: str) -> TensorInfo:
        start, rows = self.place(name)
        return TensorInfo(name, "uint8", rows, self.directory, start, rows[0] * rows[1])

    def check_finite(self, name: str) -> None:
        """Look at every float of a tensor as it is stored: scales and minima of its blocks.

        Raises:
            CheckpointError: one is NaN or infinity.
        """
        kind, stored = self.kind(name), self._stored[self._names[name]]
        data, dtype = stored.data.reshape(-1).view(np.uint8), PLAIN.get(kind)
        places: tuple[int, ...] = (0,)
        width = {"float32": 4}.get(dtype or "", 2)
        if dtype is None:
            gguf = FORMAT.library("gguf")
            places = HALVES[kind]
            width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        for start in range(0, len(data), _PIECE // width * width):
            piece = data[start : start + _PIECE // width * width].reshape(-1, width)
            for place in places:
                floats = piece if dtype else piece[:, place : place + 2]
                if not finite_bytes(floats.tobytes(), dtype or "float16"):
                    raise CheckpointError(
                        f"{self.directory}: {name} holds NaN or infinity: the file is damaged. "
                        "Download or copy it again."
                    )


class GGUFGrids(QuantizedCheckpoint):
    """A GGUF file as a quantized base, of which the headers are read; minima are stored."""

    format = FORMAT.name
    integers = "weight"
    reader: GGUFHeaders

    def _open_reader(self, path: Path) -> CheckpointReader:
        return GGUFHeaders(path)

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


open_checkpoint = GGUFGrids
