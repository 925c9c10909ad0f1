"""One view of a quantized model on disk, in our format or a foreign one, layer by layer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_kernels import QuantSpec
from qalora_kernels.stored import QUANT_METHOD, QUANTIZED_TENSORS, TensorPlan, layer_plan

from ..errors import CheckpointError, ConfigError, QALoRAError
from ..files.manifest import check_manifest
from ..files.names import CONFIG_FILE
from ..files.reader import CheckpointReader
from ..files.schemas import QuantizationConfig, check_types
from .config import QALoRAQuantConfig
from .format import ADAPT_MODES, format_named, formats, unread_note
from .kind import find_kind, find_model
from .layout import read_layer
from .side_files import copy_side_files
from .source import SOURCE_KEY, describe_location
from .validate import check_layers, check_values

if TYPE_CHECKING:
    import torch

    from qalora_kernels import PackedWeight


class QuantizedCheckpoint:
    """A quantized base or merged model in our format, its headers checked against its config.

    A foreign format is a subclass that reads layers in its own way; `open_quantized` chooses it.

    Attributes:
        format: "qalora", or the name of the foreign format.
        reader: the directory's tensors.
        config: our quantization config; derived for a foreign format.
        layers: the grid of every quantized layer by name.
        facts: what `qalora inspect` says of a foreign format beyond the config.
        bound: whether config.json is known to be the one that the tensors were written for.
    """

    format = QUANT_METHOD
    integers = "qweight"
    """Last part of the name of the tensor that holds a layer's integers, which every layer has."""
    foreign_parts: tuple[str, ...] = ()
    """Names of tensors of a quantized layer that only the foreign format has, such as "qzeros"."""

    def __init__(self, directory: str | Path) -> None:
        """Read and check config.json and the headers of a local directory; no layer is read.

        Raises:
            CheckpointError: not quantized, damaged, or its config contradicts its tensors.
        """
        self.reader = self._open_reader(Path(directory))
        self.bound = self.reader.check_bound()
        self.facts: dict[str, Any] = {}
        self.config, self.layers = self._read_config()
        if self.is_foreign:
            found = describe_location(self.directory)
            frozen = self._frozen()
            self.config.base[SOURCE_KEY] = {"format": self.format, **found, "frozen": frozen}

    def _open_reader(self, path: Path) -> CheckpointReader:
        """Open the tensors; a foreign format that stores them otherwise gives its own reader."""
        return CheckpointReader(path)

    def _read_config(self) -> tuple[QALoRAQuantConfig, dict[str, QuantSpec]]:
        raw = self.reader.config.get("quantization_config")
        if not isinstance(raw, dict) or raw.get("quant_method") != QUANT_METHOD:
            method = raw.get("quant_method") if isinstance(raw, dict) else None
            found = f"quant_method {method!r}" if method else "a model that is not quantized"
            read = ", ".join(format.name for format in formats() if format.is_base)
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: expected a model that qalora quantized, or one "
                f"in a format of integers that it reads ({read}), found {found}"
                f"{unread_note(method)}. Quantize "
                "the 16-bit model with `qalora quantize`."
            )
        check_types(raw, QuantizationConfig, f"{self.directory / CONFIG_FILE}", CheckpointError)
        try:
            config = QALoRAQuantConfig(**raw)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{self.directory / CONFIG_FILE}: {error}") from error
        return config, check_layers(self.reader, config)

    @property
    def is_foreign(self) -> bool:
        """True if the model is stored in a format that is not ours."""
        return self.format != QUANT_METHOD

    @property
    def directory(self) -> Path:
        """The directory that was opened, or the file."""
        return self.reader.directory

    def takes_back(self, name: str) -> tuple[str, ...]:
        """Return the modes of `adapt` whose result this layer takes back in the foreign format."""
        return format_named(self.format).takes_back

    def _frozen(self) -> dict[str, list[str]]:
        """Return, by mode of `adapt`, the layers that do not take its result back; "*" for all."""
        frozen = {}
        for adapt in ADAPT_MODES:
            names = [name for name in self.layers if adapt not in self.takes_back(name)]
            if names:
                frozen[adapt] = names if len(names) < len(self.layers) else ["*"]
        return frozen

    def write_side_files(self, target: Path) -> None:
        """Write what belongs to the model beside weights and config: tokenizer, licence, ..."""
        copy_side_files(self.directory, target)

    def layer(self, name: str, *, integers: bool = True) -> "PackedWeight":
        """Read one layer, its values checked.

        Args:
            name: of the layer.
            integers: of our format, False leaves them out: `qweight` is on the meta device.

        Returns:
            Scales [G, N] in fp32, each representable in fp16, and offsets [G, N] in fp32, each
            representable in the config's offsets_dtype (with offsets_at "minimum" computed from
            the stored minima, see `qalora_kernels.load_offsets`).

        Raises:
            CheckpointError: a scale or offset that is not finite, or a group index out of range.
        """
        weight = self._read_layer(name) if integers else self._read_grid(name)
        check_values(self.where(name), weight)
        return weight

    def _read_grid(self, name: str) -> "PackedWeight":
        return read_layer(self.reader, name, self.layers[name], integers=False)

    def _read_layer(self, name: str) -> "PackedWeight":
        return read_layer(self.reader, name, self.layers[name])

    def g_idx(self, name: str) -> "torch.Tensor | None":
        """Return the group of each input of a layer, int32 [K]; None without act-order.

        Of a foreign format the whole layer is read: the tensor has another name there.
        """
        return self.layer(name, integers=self.is_foreign).g_idx if self.config.desc_act else None

    def qweight(self, name: str) -> "torch.Tensor":
        """Return one layer's integers in our packing, int32 [ceil(K/32)*bits, N]."""
        return self.reader.get(f"{name}.{self.integers}")

    def where(self, name: str) -> str:
        """Return file and name of a layer, for messages."""
        return f"{self.reader.info(f'{name}.{self.integers}').file}: {name}"

    @property
    def packed_parts(self) -> tuple[str, ...]:
        """Last parts of the names of a quantized layer's tensors, the bias left out."""
        return (*QUANTIZED_TENSORS, *self.foreign_parts)

    @property
    def weight_names(self) -> list[str]:
        """Names of all tensors as if no layer were quantized: a quantized one has its `weight`."""
        return [*self.dense_names, *(f"{layer}.weight" for layer in self.layers)]

    @property
    def dense_names(self) -> list[str]:
        """Tensors that are in no quantized layer's packed form: embeddings, norms, biases, ..."""
        packed = {f"{name}.{part}" for name in self.layers for part in self.packed_parts}
        return [name for name in self.reader.tensors if name not in packed]

    def plan(self) -> TensorPlan:
        """Names, dtypes and shapes of this checkpoint written in our format, layer by layer."""
        plan: TensorPlan = self.reader.plan(self.dense_names)
        for name, spec in self.layers.items():
            plan.update(layer_plan(name, spec, self.config.desc_act))
        order = {name: i for i, name in enumerate(self.reader.tensors)}

        def place(tensor: str) -> int:  # a layer's parts side by side, in the order of the files
            layer = tensor.rpartition(".")[0]
            return order[f"{layer}.{self.integers}" if layer in self.layers else tensor]

        return {name: plan[name] for name in sorted(plan, key=place)}


def open_quantized(
    name_or_path: str | Path, revision: str | None = None, *, check_hashes: bool = True
) -> QuantizedCheckpoint:
    """Open a quantized checkpoint, in our format or in a foreign one that can be a base.

    Args:
        name_or_path: a directory, a file in a format that is one file, or a Hub id.
        revision: branch, tag or commit of the Hub repository.
        check_hashes: compare all files with the directory's manifest, if it has one, which reads
            each once in a process (see `files.manifest.unchecked_hashes`).

    Raises:
        CheckpointError: it cannot be found, is not quantized, is an export that cannot be a base,
            or is damaged.
    """
    directory = find_model(name_or_path, revision)
    checkpoint = _open(directory, headers=False)
    if check_hashes:
        check_manifest(directory)
    return checkpoint


def open_headers(path: Path) -> QuantizedCheckpoint:
    """Open a local checkpoint for what its headers say alone, without torch.

    Names of tensors are those of the files, and layers of some formats cannot be read.

    Raises:
        CheckpointError: as of `open_quantized`.
    """
    return _open(path, headers=True)


def _open(path: Path, headers: bool) -> QuantizedCheckpoint:
    kind = find_kind(path)
    if kind.base is not None:
        module = kind.base.module(kind.base.headers if headers else "read")
        try:
            foreign: QuantizedCheckpoint = module.open_checkpoint(path)
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            if isinstance(error, QALoRAError):
                raise
            raise CheckpointError(
                f"{path}: its config or its metadata hold values of other types than its format "
                f"has ({type(error).__name__}: {error!s:.200}). Download or copy it again."
            ) from error
        return foreign
    if kind.export is not None:
        raise CheckpointError(
            f"{path}: is an export in format {kind.export!r}, for other runtimes. Give the "
            f"model that it was made from; `qalora verify {path} --against MODEL` compares "
            "the two."
        )
    return QuantizedCheckpoint(path)
