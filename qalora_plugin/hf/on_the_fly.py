"""Quantize a 16-bit model while transformers loads it, one layer at a time."""

from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from qalora_kernels import QuantSpec

from ..architecture.selection import check_group_sizes, check_overrides, linears_to_quantize
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.fingerprint import mark
from ..errors import ConfigError, QALoRAError
from ..layers.linear import QuantLinear
from ..quantize.rtn import rtn
from .sharded_loading import loads_sharded, shard


class LayerQuantizer:
    """The layers to quantize while a model loads, and what became of them.

    Attributes:
        specs: the grid of every layer to quantize, by name.
        error: the first error, kept because transformers would only log it.
        marks: for the fingerprint, where the layers are sharded at once.
    """

    def __init__(self, model: nn.Module, config: QALoRAQuantConfig) -> None:
        """Choose the layers, and let their weights arrive in fp32.

        Args:
            model: on the meta device, without weights.
            config: of the quantization.

        Raises:
            ConfigError: the model has no layer to quantize, a setting names none of them, or asks
                for what needs calibration data.
        """
        _check_data_free(config)
        self.specs: dict[str, QuantSpec] = {}
        self.error: QALoRAError | None = None
        self.marks: list[str] = []
        linears = linears_to_quantize(model, config.modules_to_not_convert)
        check_group_sizes(config.group_sizes, linears.values())
        for name, linear in linears.items():
            self.specs[name] = config.spec_for(name, linear.in_features, linear.out_features)
            # a checkpoint's tensor is cast to this dtype before it is quantized: not to bf16
            empty = torch.empty(linear.weight.shape, dtype=torch.float32, device="meta")
            linear.weight = nn.Parameter(empty, requires_grad=False)
        check_overrides(config.dynamic, self.specs)

    def quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Replace the layer `name` of the model by its quantized form."""
        linear = cast(nn.Linear, model.get_submodule(name))
        spec = self.specs[name]
        fit = rtn(weight, spec, name=name)
        layer = QuantLinear.from_codes(spec, fit.codes(), fit.scales, fit.offsets)
        if loads_sharded():
            self.marks.append(mark(name, layer.qweight))
            layer = shard(layer)
        layer.bias = linear.bias  # loaded already, or about to be
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            if tensor is not layer.bias:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        layer._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, layer)

    def finish(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Give layers that no tensor came for (new heads) the model's dtype again.

        Raises:
            QALoRAError: a layer could not be quantized.
        """
        if self.error is not None:
            raise self.error
        for name in self.specs:
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(dtype))


def _check_data_free(config: QALoRAQuantConfig) -> None:
    if config.desc_act:
        raise ConfigError(
            "quantization_config: desc_act orders inputs by calibration data, and there is none "
            "while a model loads. Leave it out, or quantize with `qalora quantize MODEL --out DIR "
            "--calibration FILE --desc-act` and load the result without quantization_config."
        )
    if config.method != "rtn":
        raise ConfigError(
            f"quantization_config: method {config.method!r} needs calibration data, and there is "
            "none while a model loads. Leave it out (rtn), or quantize with `qalora quantize MODEL "
            "--out DIR --calibration FILE` and load the result without quantization_config."
        )


class QuantizeOnLoad(ConversionOps):
    """transformers' loading step for one weight: quantize it, keep nothing else of it."""

    def __init__(self, layers: LayerQuantizer) -> None:
        self._layers = layers

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantize the weights among `input_dict` {name: tensor or [tensor]}; pass the rest on."""
        rest = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            if name not in self._layers.specs:
                rest[key] = value
                continue
            weight = value[0] if isinstance(value, list) else value
            if missing_keys is not None:
                missing_keys.discard(key)
            if self._layers.error is None:
                try:
                    self._layers.quantize(model, name, weight)
                except QALoRAError as error:
                    self._layers.error = error
        return rest
