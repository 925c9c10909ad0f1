"""Read MLX directories as quantized bases: affine quantization of 2, 3, 4, 5, 6 and 8 bits.

MLX (`ops.cpp`, `affine_dequantize`) stores, in the layout that `write` describes,

    W = scales * q + biases       scales of both signs; biases are the weights at code 0

which `offsets_at: minimum` holds as it is. 5 and 6 bits are a stream of 32-bit words like the
others; our layers take them in codes of 8 bits. MLX quantizes embeddings and heads too: these are
dense tensors here, dequantized in fp32, and stay as they are when a merged model is written back.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from qalora_kernels import QuantSpec

from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError
from ...files.json import read_json
from ...files.names import CONFIG_FILE
from ...files.reader import CheckpointReader, in_pieces
from ...files.safetensors import TensorInfo
from . import FORMAT, GROUP_SIZES, QUANTIZATION

if TYPE_CHECKING:  # headers are checked without it
    import torch

    from qalora_kernels import PackedWeight

_BITS = (2, 3, 4, 5, 6, 8)
_FLOATS = ("float16", "bfloat16")
_PARTS = ("weight", "scales", "biases")
_ROWS_BYTES = 2 << 20  # of an embedding, dequantized at a time
_WHOLE = "Download or copy the model again."
_ANOTHER = (
    "Convert the 16-bit model again with `mlx_lm.convert -q --q-mode affine`, or quantize it with "
    "`qalora quantize`."
)


class Grid(NamedTuple):
    """What config.json says of one module."""

    bits: int
    group_size: int

    @property
    def container(self) -> int:
        """The width of the codes that hold it in our layers."""
        return 8 if self.bits in (5, 6) else self.bits


def _parse_grid(raw: dict[str, Any], where: str) -> Grid:
    mode = raw.get("mode", "affine")
    if mode != "affine":
        raise CheckpointError(
            f"{where}: is quantized in MLX's mode {mode!r}, whose codes are no integers with a "
            f"scale and an offset: it cannot be a base. {_ANOTHER}"
        )
    bits: Any = raw.get("bits")
    group_size: Any = raw.get("group_size")
    if bits not in _BITS or group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"{where}: expected bits {_BITS} and a group_size of 32, 64 or 128, found {bits!r} and "
            f"{group_size!r}. {_ANOTHER}"
        )
    return Grid(bits, group_size)


def parse_config(raw: dict[str, Any], path: Path) -> QALoRAQuantConfig:
    """Return our config of an MLX base, from its `quantization` alone.

    Raises:
        CheckpointError: a mode, width or group size that is not read.
    """
    grid = _parse_grid(raw, f"{path}: {QUANTIZATION}")
    return QALoRAQuantConfig(grid.container, grid.group_size, offsets_at="minimum")


class MLXReader(CheckpointReader):
    """The tensors of an MLX directory.

    Attributes:
        grids: of the quantized layers, by name.
        tensors: as in the files, but for quantized embeddings and heads, which are dense.
    """

    def __init__(self, directory: Path) -> None:
        """Read config.json and the headers, and check the quantized modules.

        Raises:
            CheckpointError: damaged, or quantized in a way that is not read.
        """
        super().__init__(directory)
        self._stated = read_json(directory / CONFIG_FILE)
        self.grids: dict[str, Grid] = {}
        self._embeddings: dict[str, tuple[Grid, dict[str, TensorInfo]]] = {}
        text = self.config.get("text_config", self.config)
        for scales in [name for name in self.tensors if name.endswith(".scales")]:
            name = scales.removesuffix(".scales")
            grid = self._check_module(name)
            if self.info(scales).shape[0] == text.get("vocab_size"):
                self._embeddings[name] = (grid, self._take_parts(name, grid))
            else:
                self.grids[name] = grid

    @cached_property
    def quantization(self) -> dict[str, Any]:
        """What config.json says of the quantization: of all modules, and of some by name."""
        found = self._stated.get(QUANTIZATION) or self._stated.get("quantization_config")
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: expected an object `quantization`, found "
                f"{found!r}. {_WHOLE}"
            )
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The directory's config.json, without what marks it as MLX's."""
        known = (QUANTIZATION, "quantization_config")
        return {key: value for key, value in self._stated.items() if key not in known}

    def _check_module(self, name: str) -> Grid:
        """Check a module's tensors against config.json, from the headers; return its grid."""
        own = self.quantization.get(name)
        raw = own if isinstance(own, dict) else self.quantization
        grid = _parse_grid(raw, f"{self.directory / CONFIG_FILE}: {QUANTIZATION} of {name}")
        for part in _PARTS:
            if f"{name}.{part}" not in self:
                raise CheckpointError(
                    f"{self.directory}: {name}.{part} is missing: not a whole MLX layer. {_WHOLE}"
                )
        weight, scales, biases = (self.info(f"{name}.{part}") for part in _PARTS)
        if len(weight.shape) != 2:
            raise CheckpointError(
                f"{weight.file}: {weight.name}: has shape {list(weight.shape)}, which is that of a "
                "mixture's experts. Such a model cannot be a base yet."
            )
        k, rest = divmod(weight.shape[1] * 32, grid.bits)
        shape = (weight.shape[0], k // grid.group_size)
        whole = not rest and k % grid.group_size == 0
        if not whole or weight.dtype_name != "uint32" or {scales.shape, biases.shape} != {shape}:
            raise CheckpointError(
                f"{weight.file}: {name}: weight {weight.dtype_name} {list(weight.shape)}, scales "
                f"{list(scales.shape)}, biases {list(biases.shape)} are not those of "
                f"bits={grid.bits}, group_size={grid.group_size} ({CONFIG_FILE}). {_WHOLE}"
            )
        dtypes = {scales.dtype_name, biases.dtype_name}
        if len(dtypes) > 1 or not dtypes <= {*_FLOATS}:
            raise CheckpointError(
                f"{scales.file}: {name}: scales and biases are {' and '.join(sorted(dtypes))}; "
                f"expected both in {' or '.join(_FLOATS)}, to whose numbers training rounds. Of an "
                "export of ours take the model that it was made from; else convert the model with "
                "`mlx_lm.convert --dtype bfloat16`."
            )
        return grid

    def _take_parts(self, name: str, grid: Grid) -> dict[str, TensorInfo]:
        """Make one dense tensor of an embedding's parts, and return these."""
        parts = {part: self.info(f"{name}.{part}") for part in _PARTS}
        for part in ("scales", "biases"):
            del self.tensors[f"{name}.{part}"]
        stored = parts["weight"]
        shape = (stored.shape[0], stored.shape[1] * 32 // grid.bits)
        dense = replace(stored, dtype_name="float32", shape=shape, nbytes=4 * shape[0] * shape[1])
        self.tensors[stored.name] = dense
        return parts

    def get(self, name: str) -> "torch.Tensor":
        """Read one tensor; a quantized embedding in fp32."""
        import torch

        if name.removesuffix(".weight") not in self._embeddings:
            return super().get(name)
        return torch.cat(list(self._rows(name)))

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor as `get` gives it, in pieces as those of any other file."""
        if name.removesuffix(".weight") not in self._embeddings:
            yield from super().chunks(name)
            return
        yield from in_pieces(self._rows(name))

    def check_finite(self, name: str) -> None:
        """Read a tensor of floats through; of a quantized embedding its scales and biases."""
        parts = self._embeddings.get(name.removesuffix(".weight"), (None, {}))[1]
        if not parts:
            super().check_finite(name)
            return
        stored = CheckpointReader(self.directory)
        for part in ("scales", "biases"):
            stored.check_finite(parts[part].name)

    def _rows(self, name: str) -> Iterator["torch.Tensor"]:
        """Yield some rows at a time of an embedding, fp32, contiguous."""
        import torch

        from qalora_kernels import unpack

        grid, parts = self._embeddings[name.removesuffix(".weight")]
        count, k = self.info(name).shape
        step = max(1, _ROWS_BYTES // (4 * k))
        for start in range(0, count, step):
            stop = min(start + step, count)
            words, scales, biases = (self._read_rows(parts[p], start, stop) for p in _PARTS)
            codes = unpack(words.view(torch.int32).t().contiguous(), grid.bits, k).t().float()
            groups = codes.reshape(stop - start, -1, grid.group_size)
            values = groups * scales.float().unsqueeze(2) + biases.float().unsqueeze(2)
            yield values.reshape(stop - start, k)

    def _read_rows(self, info: TensorInfo, start: int, stop: int) -> "torch.Tensor":
        import torch

        width = info.nbytes // info.shape[0]
        data = torch.empty((stop - start) * width, dtype=torch.uint8, device="cpu")
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start + start * width)
            self._fill(file, memoryview(data.numpy()), info)  # type: ignore[arg-type]
        return data.view(info.dtype).reshape(stop - start, *info.shape[1:])


class MLXCheckpoint(QuantizedCheckpoint):
    """An MLX directory as a quantized base; biases are minima, and exact."""

    format = FORMAT.name
    integers = "weight"
    foreign_parts = ("biases",)
    reader: MLXReader

    def _open_reader(self, path: Path) -> CheckpointReader:
        return MLXReader(path)

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        reader, path = self.reader, self.directory / CONFIG_FILE
        usual, grids = parse_config(reader.quantization, path), reader.grids
        if not grids:
            raise CheckpointError(
                f"{path}: says that the model is quantized by MLX, but no layer is. {_WHOLE}"
            )
        dtypes = {reader.info(f"{name}.scales").dtype_name for name in grids}
        if len(dtypes) > 1:
            raise CheckpointError(
                f"{self.directory}: its layers have scales in {' and in '.join(sorted(dtypes))}; "
                "expected one dtype. Convert the model again with `mlx_lm.convert --dtype`."
            )
        dynamic = {
            name: {"bits": grid.container, "group_size": grid.group_size}
            for name, grid in grids.items()
            if (grid.container, grid.group_size) != (usual.bits, usual.group_size)
        }
        config = QALoRAQuantConfig(
            usual.bits,
            usual.group_size,
            offsets_at="minimum",
            scales_dtype=dtypes.pop(),
            dynamic=dynamic,
            base={"name_or_path": self.directory.name},
        )
        layers = {}
        for name, grid in grids.items():
            rows, words = reader.info(f"{name}.weight").shape
            layers[name] = config.spec_for(name, words * 32 // grid.bits, rows)
        return config, layers

    def qweight(self, name: str) -> "torch.Tensor":
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        import torch

        from qalora_kernels import pack, unpack

        grid, spec = self.reader.grids[name], self.layers[name]
        words = self.reader.get(f"{name}.weight").view(torch.int32).t().contiguous()
        if grid.bits == spec.bits:
            return words
        return pack(unpack(words, grid.bits, spec.in_features), spec.bits)

    def _read_layer(self, name: str) -> "PackedWeight":
        from qalora_kernels import PackedWeight, load_offsets

        spec, get = self.layers[name], self.reader.get
        scales = get(f"{name}.scales").t().contiguous().float()
        biases = get(f"{name}.biases").t().contiguous()
        offsets = load_offsets(biases, scales, spec)
        return PackedWeight(self.qweight(name), scales, offsets, None, spec)


open_checkpoint = MLXCheckpoint
