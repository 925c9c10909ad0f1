"""Read compressed-tensors checkpoints (llm-compressor, format pack-quantized) as quantized bases.

The layout is that of `layout`: weights of 2, 3, 4 and 8 bits, symmetric or with integer
zero-points, one scale a group or an output, act-order or not. Then

    W[n, k] = scales[n, g] * (q - z) = scales * (q - mid) + scales * (mid - z)    exact in fp32
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec

from ...architecture.patterns import match_start
from ...checkpoint.checkpoint import QuantizedCheckpoint
from ...checkpoint.config import QALoRAQuantConfig
from ...errors import CheckpointError, ConfigError
from ...files.names import CONFIG_FILE
from ...files.schemas import CompressedGroup, CompressedTensors, check_types
from ..packings import QUANTIZE_AGAIN, scales_dtype
from . import FORMAT
from .layout import G_IDX, PARTS, SCALE, SHAPE, WEIGHT, ZERO_POINT, unpack_columns_of, words

if TYPE_CHECKING:  # headers are checked without it
    import numpy
    import torch

    from qalora_kernels import PackedWeight

PACKED = "pack-quantized"
_DAMAGED = "The checkpoint is damaged or incomplete: copy or download it again."


@dataclass(frozen=True)
class Scheme:
    """How one config group is quantized.

    Args:
        targets: names of layers, regular expressions after "re:", or classes of modules.
        bits: of a code.
        group_size: inputs that share a scale, -1 for all.
        symmetric: no zero-points are stored.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int
    symmetric: bool

    def names(self, layer: str) -> bool:
        """Say whether a target is this layer's name, or a regular expression of it."""
        return any(
            match_start(target[3:], layer) if target.startswith("re:") else target == layer
            for target in self.targets
        )


def _schemes(raw: dict[str, Any], path: Path) -> list[Scheme]:
    """Check `quantization_config`, and return how each of its config groups is quantized.

    Raises:
        CheckpointError: it names a format or an option that is not read.
    """
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(
            f"{path}: config_groups: expected an object, found {groups!r}. {_DAMAGED}"
        )
    check_types(raw, CompressedTensors, str(path), CheckpointError)
    sparsity = (raw.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(
            f"{path}: sparsity_config: format {sparsity!r} is not read, only 'dense' is. "
            f"{QUANTIZE_AGAIN}"
        )
    if (raw.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            f"{path}: transform_config: expected none, found rotations of the activations, which "
            f"this package does not compute. {QUANTIZE_AGAIN}"
        )
    return [
        _scheme(f"{path}: config_groups[{name!r}]: ", group, raw.get("format"))
        for name, group in groups.items()
    ]


def _scheme(where: str, group: Any, usual_format: Any) -> Scheme:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}weights: expected an object, found {weights!r}. {_DAMAGED}")
    check_types(group, CompressedGroup, where.removesuffix(": "), CheckpointError)
    format, type = group.get("format") or usual_format, weights.get("type", "int")
    if format != PACKED or type != "int":
        raise CheckpointError(
            f"{where}{weights.get('num_bits')}-bit {type} weights in format {format!r} are not "
            f"read; expected integers in format {PACKED!r}. {QUANTIZE_AGAIN}"
        )
    if group.get("input_activations") is not None:
        raise CheckpointError(
            f"{where}input_activations: expected null, found quantized activations, which this "
            f"package does not compute. {QUANTIZE_AGAIN}"
        )
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel") or weights.get("dynamic"):
        raise CheckpointError(
            f"{where}strategy {strategy!r} (dynamic: {weights.get('dynamic', False)}) is not read; "
            f"expected 'group' or 'channel'. {QUANTIZE_AGAIN}"
        )
    bits: Any = weights.get("num_bits")
    size: Any = weights.get("group_size") if strategy == "group" else -1
    try:
        QALoRAQuantConfig(bits, size)
    except ConfigError as error:
        why = str(error).removeprefix("quantization_config: ")
        raise CheckpointError(f"{where}{why}. {QUANTIZE_AGAIN}") from error
    symmetric = bool(weights.get("symmetric", True))
    return Scheme(tuple(group.get("targets") or ()), bits, size, symmetric)


def _as_ours(scheme: Scheme, **more: Any) -> QALoRAQuantConfig:
    grid = (scheme.bits, scheme.group_size)
    return QALoRAQuantConfig(*grid, offsets_dtype="float32", method="other", **more)


def parse_config(raw: dict[str, Any], path: Path) -> QALoRAQuantConfig:
    """Return our config of a base, from its `quantization_config` alone.

    Raises:
        CheckpointError: it names a format or an option that is not read.
    """
    return _as_ours(_schemes(raw, path)[0])


class CompressedTensorsCheckpoint(QuantizedCheckpoint):
    """A pack-quantized checkpoint as a quantized base; offsets are held in fp32, exactly."""

    format = FORMAT.name
    integers = WEIGHT
    foreign_parts = PARTS

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        raw = self.reader.config["quantization_config"]
        self._schemes = schemes = _schemes(raw, self.directory / CONFIG_FILE)
        suffix = f".{WEIGHT}"
        names = [n.removesuffix(suffix) for n in self.reader.tensors if n.endswith(suffix)]
        if not names:
            raise CheckpointError(f"{self.directory}: no tensor is a {WEIGHT}. {_DAMAGED}")
        layers = {name: self._check_layer(name) for name in names}
        usual = schemes[0]
        dynamic = {
            name: {"bits": spec.bits, "group_size": spec.group_size}
            for name, spec in layers.items()
            if (spec.bits, spec.group_size) != (usual.bits, _size(usual, spec.in_features))
        }
        symmetric = all(self._scheme_of(name).symmetric for name in names)
        self.facts = {"sym": symmetric}
        base = {"name_or_path": self.directory.name, "format": self.format, "sym": symmetric}
        config = _as_ours(
            usual,
            desc_act=self._has_act_order,
            dynamic=dynamic,
            base=base,
            scales_dtype=self._scales_dtype,
        )
        return config, layers

    @cached_property
    def _scales_dtype(self) -> str:
        return scales_dtype(self.reader, SCALE)

    def _scheme_of(self, name: str) -> Scheme:
        """Return how a layer is quantized: as its name says, or else its class."""
        named = [scheme for scheme in self._schemes if scheme.names(name)]
        by_class = [scheme for scheme in self._schemes if "Linear" in scheme.targets]
        found = [*named, *by_class]
        if not found:
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: no target of config_groups names the quantized "
                f"layer {name}. {_DAMAGED}"
            )
        return found[0]

    def _check_layer(self, name: str) -> QuantSpec:
        """Check a layer's tensors against the config, from the headers, and return its grid."""
        scheme, reader = self._scheme_of(name), self.reader
        needed = [WEIGHT, SCALE, SHAPE] + ([] if scheme.symmetric else [ZERO_POINT])
        for part in needed:
            if f"{name}.{part}" not in reader:
                raise CheckpointError(f"{self.directory}: {name}.{part} is missing. {_DAMAGED}")
        shape = reader.integers(f"{name}.{SHAPE}").tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise CheckpointError(
                f"{self.directory}: {name}.{SHAPE}: expected two sizes, found {shape}. {_DAMAGED}"
            )
        n, k = shape
        spec = QuantSpec(scheme.bits, scheme.group_size, k, n, "float32", self._scales_dtype)
        groups = spec.num_groups
        expected: dict[str, list[tuple[int, ...]]] = {
            WEIGHT: [(n, width) for width in _widths(k, spec.bits)],
            SCALE: [(n, groups)],
            ZERO_POINT: [(width, groups) for width in _widths(n, spec.bits)],
            G_IDX: [(k,)],
        }
        for part, shapes in expected.items():
            if part not in needed and (part != G_IDX or f"{name}.{part}" not in reader):
                continue
            info = reader.info(f"{name}.{part}")
            fits = info.is_float if part == SCALE else info.dtype_name == "int32"
            if not fits or info.shape not in shapes:
                raise CheckpointError(
                    f"{info.file}: {info.name}: expected {'floats' if part == SCALE else 'int32'} "
                    f"{list(shapes[0])} for num_bits={spec.bits}, group_size="
                    f"{scheme.group_size} and a weight {shape}, found {info.dtype_name} "
                    f"{list(info.shape)}. The config contradicts the tensors. {_DAMAGED}"
                )
        return spec

    @cached_property
    def _has_act_order(self) -> bool:
        """Whether any layer's groups are not k // group_size."""
        suffix = f".{G_IDX}"
        names = [n.removesuffix(suffix) for n in self.reader.tensors if n.endswith(suffix)]
        return any(self._g_idx(name) is not None for name in names)

    def _g_idx(self, name: str) -> "numpy.ndarray | None":
        """Return the group of each input; None where it is k // group_size, or was never set."""
        if f"{name}.{G_IDX}" not in self.reader:
            return None
        import numpy as np

        g_idx = self.reader.integers(f"{name}.{G_IDX}")
        size = self._scheme_of(name).group_size
        plain = np.arange(len(g_idx)) // (len(g_idx) if size == -1 else size)
        never_set = (g_idx == -1).any()
        return None if never_set or np.array_equal(g_idx, plain) else g_idx.copy()

    def qweight(self, name: str) -> "torch.Tensor":
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        import torch

        from qalora_kernels.packing import pack

        spec, packed = self.layers[name], self.reader.get(f"{name}.{WEIGHT}")
        if packed.shape[1] != words(spec.in_features, spec.bits):
            return pack(unpack_columns_of(packed, spec.bits, spec.in_features).t(), spec.bits)
        qweight = torch.zeros(spec.packed_rows, spec.out_features, dtype=torch.int32)
        qweight[: packed.shape[1]] = packed.t()
        return qweight

    def _read_layer(self, name: str) -> "PackedWeight":
        import torch

        from ..zero_points import layer_of_zeros

        spec, reader = self.layers[name], self.reader
        scales = reader.get(f"{name}.{SCALE}").t().contiguous()
        zeros = torch.full(scales.shape, spec.mid)
        if not self._scheme_of(name).symmetric:
            packed = reader.get(f"{name}.{ZERO_POINT}").t().contiguous()
            zeros = unpack_columns_of(packed, spec.bits, spec.out_features)
        g_idx = None
        if self.config.desc_act:
            usual = torch.arange(spec.in_features, dtype=torch.int32) // spec.group_size
            found = self._g_idx(name)
            g_idx = usual if found is None else torch.from_numpy(found)
        where = f"{self.where(name)}.{SCALE}"
        return layer_of_zeros(where, spec, self.qweight(name), scales, zeros, g_idx)


def _size(scheme: Scheme, in_features: int) -> int:
    return in_features if scheme.group_size == -1 else scheme.group_size


def _widths(columns: int, bits: int) -> list[int]:
    """Return the int32 words that hold so many codes: dense, and as versions before 0.20 pack."""
    return [words(columns, bits), -(-columns // (32 // bits))]


open_checkpoint = CompressedTensorsCheckpoint
