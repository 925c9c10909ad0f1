"""One view of a quantized checkpoint on disk, whether it is in our format or a stock GPTQ one.

Merging, verifying and exporting walk its layers through this, one in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qalora_kernels import load_offsets, store_offsets

from ..errors import CheckpointError, ConfigError
from ..quant.config import QUANT_METHOD, QALoRAQuantConfig
from . import stock_gptq
from .layout import GUARD, QUANTIZED_TENSORS, TensorPlan, guard_tensor, layer_plan
from .reader import CONFIG_FILE, CheckpointReader, read_json, resolve_model_dir
from .side_files import RECORD_FILE
from .validate import check_layers, check_values


@dataclass
class LayerTensors:
    """The numbers of one quantized layer.

    Args:
        qweight: int32 [ceil(K/32)*bits, N].
        scales: fp32 [G, N], each representable in fp16.
        offsets: fp32 [G, N], each representable in the config's offsets_dtype; with offsets_at
            "minimum" computed from the stored minima, see `qalora_kernels.load_offsets`.
        g_idx: int32 [K] with desc_act, else None.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    g_idx: torch.Tensor | None


class QuantizedCheckpoint:
    """A quantized base or merged model on disk, its headers checked against its config.

    Attributes:
        reader: its tensors.
        config: our quantization config; derived for a stock GPTQ checkpoint.
        layers: the grid of every quantized layer by name.
        stock: the stock GPTQ config, or None for our own format.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read and check config.json and the headers; no layer is read.

        Args:
            directory: a local directory (see `open_quantized` for Hub ids).

        Raises:
            CheckpointError: not quantized, damaged, or its config contradicts its tensors.
        """
        _refuse_export(Path(directory))
        self.reader = CheckpointReader(directory)
        raw = self.reader.config.get("quantization_config")
        self.stock: stock_gptq.StockConfig | None = None
        if isinstance(raw, dict) and raw.get("quant_method") == QUANT_METHOD:
            self.config = _own_config(self.reader, raw)
            self.layers = check_layers(self.reader, self.config)
            return
        is_stock = stock_gptq.is_stock_gptq(raw) or (
            raw is None and (self.directory / stock_gptq.QUANTIZE_CONFIG_FILE).exists()
        )
        if not is_stock:
            method = raw.get("quant_method") if isinstance(raw, dict) else None
            raise CheckpointError(
                f"{self.directory / CONFIG_FILE}: expected a model quantized by qalora or GPTQ, "
                f"found {f'quant_method {method!r}' if method else 'a model that is not quantized'}"
                ". Quantize the 16-bit model with `qalora quantize`."
            )
        self.stock = stock_gptq.read_stock_config(self.directory)
        self.layers = stock_gptq.check_stock_layers(self.reader, self.stock)
        act_order = stock_gptq.has_act_order(self.reader, self.layers)
        self.config = stock_gptq.to_qalora_config(
            self.stock, self.layers, act_order, self.directory.name
        )

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.reader.directory

    def layer(self, name: str) -> LayerTensors:
        """Read one layer, its values checked.

        Raises:
            CheckpointError: a scale or offset that is not finite, or a group index out of range.
        """
        get, spec = self.reader.get, self.layers[name]
        where = f"{self.reader.info(f'{name}.qweight').file}: {name}"
        if self.stock is None:
            scales = get(f"{name}.scales").float()
            offsets = load_offsets(get(f"{name}.offsets"), scales, spec).float()
        else:
            scales, offsets = stock_gptq.scales_and_offsets(
                where, get(f"{name}.qzeros"), get(f"{name}.scales"), spec, self.stock
            )
        g_idx = get(f"{name}.g_idx") if self.config.desc_act else None
        check_values(where, spec, scales, offsets, g_idx)
        return LayerTensors(get(f"{name}.qweight"), scales, offsets, g_idx)

    @property
    def dense_names(self) -> list[str]:
        """Tensors that are in no quantized layer's packed form: embeddings, norms, biases, ..."""
        packed = {
            f"{name}.{part}" for name in self.layers for part in (*QUANTIZED_TENSORS, "qzeros")
        }
        return [name for name in self.reader.tensors if name not in packed]

    def plan(self) -> TensorPlan:
        """Names, dtypes and shapes of this checkpoint written in our format, layer by layer."""
        plan: TensorPlan = {}
        for name in self.dense_names:
            info = self.reader.info(name)
            plan[name] = (info.dtype, info.shape)
        for name, spec in self.layers.items():
            plan.update(layer_plan(name, spec, self.config.desc_act))
        # a layer's parts side by side, in the order of the files
        order = {name: i for i, name in enumerate(self.reader.tensors)}
        return dict(sorted(plan.items(), key=lambda item: self._place(item[0], order)))

    def _place(self, tensor: str, order: dict[str, int]) -> int:
        layer = tensor.rpartition(".")[0]
        return order[f"{layer}.qweight" if layer in self.layers else tensor]

    def stored(self, name: str, layer: LayerTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that `plan` names for one layer, in their stored dtypes."""
        spec = self.layers[name]
        yield f"{name}.qweight", layer.qweight
        yield f"{name}.scales", layer.scales.to(spec.scales_dtype)
        yield f"{name}.offsets", store_offsets(layer.offsets, layer.scales, spec)
        yield f"{name}.{GUARD}", guard_tensor(spec.in_features)
        if layer.g_idx is not None:
            yield f"{name}.g_idx", layer.g_idx


def _refuse_export(directory: Path) -> None:
    record = directory / RECORD_FILE
    format = read_json(record).get("format") if record.exists() else "gptq"
    if format not in ("gptq", "lora"):  # the one can be read, of the other the reader says more
        raise CheckpointError(
            f"{directory}: is an export in format {format!r}, for other runtimes. Give the model "
            f"that it was made from; `qalora verify {directory} --against MODEL` compares the two."
        )


def _own_config(reader: CheckpointReader, raw: dict) -> QALoRAQuantConfig:
    try:
        return QALoRAQuantConfig(**raw)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{reader.directory / CONFIG_FILE}: {error}") from error


def open_quantized(name_or_path: str | Path, revision: str | None = None) -> QuantizedCheckpoint:
    """Open a quantized checkpoint, ours or stock GPTQ.

    Args:
        name_or_path: a directory, or a Hub id.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: it cannot be found, is not quantized, or is damaged.
    """
    return QuantizedCheckpoint(resolve_model_dir(name_or_path, revision))
